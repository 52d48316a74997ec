"""What the paged attention op refuses, and in which words."""

import re
from dataclasses import dataclass, replace

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallasite.pallas_kernels.paged_attention import (
    AttentionConfig,
    PagedCache,
    Ragged,
    paged_attention,
)
from pallasite.pallas_kernels.target import CPU, V6E, Target


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of the op, right in all but what a test changes: shapes, and what they are of."""

    q: tuple[int, ...] = (4, 6, 16)
    kv_new: tuple[int, ...] = (4, 3, 2, 16)
    given_as: tuple[str, str] = ("float32", "float32")
    cache: tuple[int, ...] = (2, 7, 3, 2, 16, 16)
    held_as: str = "float32"
    scales: tuple[int, ...] | None = None
    sinks: tuple[int, ...] | None = None
    B: int = 2
    windows: tuple[int | None, ...] = ()
    target: Target = CPU

    def __call__(self) -> object:
        nothing = jnp.asarray(0, jnp.int32)
        return paged_attention(
            jnp.zeros(self.q, self.given_as[0]),
            jnp.zeros(self.kv_new, self.given_as[1]),
            PagedCache(
                values=jnp.zeros(self.cache, self.held_as),
                scales=None if self.scales is None else jnp.zeros(self.scales),
            ),
            nothing,
            Ragged(
                positions=jnp.zeros(self.q[0], jnp.int32),
                kv_lens=jnp.zeros(self.B, jnp.int32),
                query_starts=jnp.zeros(self.B + 1, jnp.int32),
                page_table=jnp.zeros((self.B, 3), jnp.int32),
                num_requests=nothing,
                num_decode=nothing,
            ),
            AttentionConfig(scale=1.0, windows=self.windows, target=self.target),
            None if self.sinks is None else jnp.zeros(self.sinks),
        )


@pytest.fixture(autouse=True)
def _unchecked():
    """As in production: the tests' checker of shapes would refuse some calls first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_right_call():
    out, cache = Call(sinks=(6,), windows=(3, None))()
    assert (out.shape, out.dtype, cache.values.shape) == ((4, 6, 16), np.float32, Call.cache)
    Call(held_as="int8", scales=(2, 7, 3, 2, 16))()
    Call(given_as=("bfloat16", "float32"), B=4)()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            Call(given_as=("float16", "float32")),
            "got q of float16; it must be float32 or bfloat16",
        ),
        (
            Call(given_as=("float32", "float16")),
            "got kv_new of float16; it must be float32 or bfloat16",
        ),
        (
            Call(q=(4, 7, 16)),
            "got 7 query heads over 3 key heads; not a multiple",
        ),
        (
            Call(kv_new=(5, 3, 2, 16)),
            "got kv_new (5, 3, 2, 16) beside q (4, 6, 16); it must be [T, K, 2, H], T and H q's",
        ),
        (
            Call(kv_new=(4, 3, 1, 16)),
            "got kv_new (4, 3, 1, 16) beside q (4, 6, 16); it must be [T, K, 2, H], T and H q's",
        ),
        (
            Call(held_as="float16"),
            "got a cache of float16; it must be one of float32, bfloat16, uint16, int8,"
            " float8_e4m3fn",
        ),
        (
            Call(cache=(2, 7, 2, 2, 16, 16)),
            "got a cache (2, 7, 2, 2, 16, 16) for rows (4, 3, 2, 16); heads must match: on cpu it"
            " must be [L, P, 3, 2, page, 16]",
        ),
        (
            Call(cache=(7, 3, 2, 16, 16)),
            "got a cache (7, 3, 2, 16, 16) for rows (4, 3, 2, 16); heads must match",
        ),
        (
            Call(target=V6E),
            "heads must match: on tpu:v6e it must be [L, P, 3, 1, page, 128]",
        ),
        (
            Call(held_as="int8"),
            "got scales None for a cache of int8; they must be (2, 7, 3, 2, 16)",
        ),
        (
            Call(held_as="float8_e4m3fn", scales=(2, 7, 3, 1, 16)),
            "got scales (2, 7, 3, 1, 16) for a cache of float8_e4m3fn; they must be"
            " (2, 7, 3, 2, 16)",
        ),
        (
            Call(scales=(2, 7, 3, 2, 16)),
            "got scales (2, 7, 3, 2, 16) for a cache of float32; they must be None",
        ),
        (
            Call(windows=(3,)),
            "got 1 windows for 2 layers; not one each",
        ),
        (
            Call(B=5),
            "got 4 tokens for 5 rows of requests; there must be as many at least",
        ),
        (
            Call(sinks=(3,)),
            "got sinks (3,) for 6 query heads; one each",
        ),
    ],
)
def test_what_is_outside_the_contract_is_refused(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


def test_a_target_without_a_body_is_refused():
    nowhere = replace(CPU, name="abacus", platform="abacus")
    sentence = "got the target abacus for paged_attention; it has bodies for the platforms cpu"
    with pytest.raises(NotImplementedError, match=sentence):
        Call(target=nowhere)()


@pytest.mark.parametrize(
    ("field", "value"),
    [("windows", (0,)), ("windows", (None, -3)), ("soft_cap", 0.0), ("soft_cap", -1.0)],
)
def test_a_config_without_meaning_is_refused(field, value):
    with pytest.raises(
        ValueError, match=rf"got {field}={re.escape(str(value))}; (it|each) must be"
    ):
        AttentionConfig(scale=1.0, **{field: value})
