"""The paged attention op against dense float64 attention, over random ragged batches.

Whatever a batch does not own is NaN: pages of nobody, rows beyond a sequence's end, entries of the
page table beyond its pages. So a read that should not count shows in the output, and a write that
should not happen shows in the cache, which is compared bit by bit.

An int8 cache holds nothing that is NaN: there its scales are.

Tolerance: keys and values are rounded to the cache's type on both sides, and scores and sums are
f32, so all types of cache are held to f32's. A score of N(0, 1) inputs has an error of some eps *
sqrt(H), an output that of its scores times its values: 64 eps times the largest value covers it,
and the measured error is a few eps. Widen it only for a body that rounds probabilities to bfloat16.

That these tests can fail was checked by breaking the reference: a mask of `s < positions` in place
of `<=` in the prefill; `s < kv_lens - 1` in the decode; a block loop that begins one block late;
queries not multiplied by the scale; a page table read one column off; a window one wider; keys
written a row late. Each fails several of them. `test_a_wrong_attention_would_be_seen` keeps that
up for the three commonest faults by asking for a difference far above the tolerance.
"""

import re
from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings

from pallasite.pallas_kernels.paged_attention import (
    AttentionConfig,
    PagedCache,
    Ragged,
    paged_attention,
)
from tests.pallas_kernels import attention_oracle as oracle

B = 5
L = 2
MAX_LEN = 320
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BITS = np.dtype(np.uint16)
FLOAT32 = np.dtype(np.float32)
INT8 = np.dtype(np.int8)

jitted = jax.jit(paged_attention, static_argnames="config")


class Setting:
    """The static side of a case: one compiled program."""

    def __init__(self, T, K, G, H, page, dtype, window=None, soft_cap=None):
        self.T, self.K, self.N, self.H, self.page = T, K, K * G, H, page
        self.dtype = dtype
        # The layers' windows differ, so that the wrong layer's would show.
        windows = () if window is None else (window, 2 * window)
        self.config = AttentionConfig(scale=H**-0.5, windows=windows, soft_cap=soft_cap)
        self.num_columns = MAX_LEN // page
        self.num_pages = B * self.num_columns + 3
        self.name = f"T{T}-K{K}-G{G}-H{H}-page{page}-{dtype}-{window}-{soft_cap}"

    def poisoned_cache(self):
        shape = (L, self.num_pages, self.K, 2, self.page, self.H)
        return oracle.Cache(shape, self.dtype)


MIXED = [
    Setting(T=150, K=1, G=1, H=16, page=16, dtype=FLOAT32),
    Setting(T=150, K=3, G=3, H=64, page=16, dtype=BITS),
    Setting(T=150, K=1, G=4, H=64, page=4, dtype=FLOAT32, window=37),
    Setting(T=30, K=3, G=1, H=16, page=32, dtype=BITS, window=130, soft_cap=2.0),
    Setting(T=150, K=1, G=3, H=16, page=16, dtype=BFLOAT16, soft_cap=5.0),
    Setting(T=150, K=3, G=2, H=16, page=16, dtype=INT8),
    Setting(T=30, K=1, G=3, H=64, page=4, dtype=INT8, window=37),
]
DECODE = [
    Setting(T=B, K=3, G=3, H=64, page=16, dtype=FLOAT32, window=20),
    Setting(T=B, K=1, G=3, H=16, page=16, dtype=BITS),
    Setting(T=B, K=3, G=2, H=64, page=16, dtype=INT8),
]


class Case:
    """The inputs of one call, and what must come of them."""

    def __init__(self, setting, lens, num_decode, num_shared=0, seed=0):
        """`lens` are each request's (new tokens, tokens in all).

        The first two requests have their first num_shared pages in common.
        """
        rng = np.random.default_rng(seed)
        self.setting, self.num_decode = setting, num_decode
        self.layer = seed % L
        K, N, H, page = setting.K, setting.N, setting.H, setting.page
        free = list(rng.permutation(setting.num_pages))
        self.sequences = []
        for num_new, kv_len in lens:
            q = rng.standard_normal((num_new, N, H)).astype(np.float32)
            kv = rng.standard_normal((kv_len, K, 2, H)).astype(np.float32)
            if kv_len > 1:
                kv[rng.integers(kv_len)] = 0  # an int8 cache has a scale of 0 for it
            pages = [int(free.pop()) for _ in range(-(-kv_len // page))]
            if len(self.sequences) == 1 and num_shared:
                pages[:num_shared] = self.sequences[0].pages[:num_shared]
                shared = num_shared * page
                kv[:shared] = self.sequences[0].given[:shared]
            held = oracle.rounded(kv, setting.dtype)
            self.sequences.append(oracle.Sequence(q=q, given=kv, kv=held, pages=tuple(pages)))
        self._rng = rng

    def call(self):
        """Returns the op's output and cache, and the cache as it must be, all as numpy."""
        setting, rng = self.setting, self._rng
        before = setting.poisoned_cache()
        after = before.copy()
        for s in self.sequences:
            before.write(self.layer, s, 0, s.num_old)
            after.write(self.layer, s, 0, len(s.kv))

        counts = [s.num_new for s in self.sequences]
        total, T = sum(counts), setting.T
        q = rng.standard_normal((T, setting.N, setting.H)).astype(np.float32)
        kv_new = rng.standard_normal((T, setting.K, 2, setting.H)).astype(np.float32)
        positions = np.zeros(T, np.int32)
        query_starts = np.full(B + 1, total, np.int32)
        kv_lens = np.zeros(B, np.int32)
        page_table = rng.choice([-1, setting.num_pages + 7], (B, setting.num_columns))
        for row, s in enumerate(self.sequences):
            start = sum(counts[:row])
            query_starts[row] = start
            kv_lens[row] = len(s.kv)
            page_table[row, : len(s.pages)] = s.pages
            span = slice(start, start + s.num_new)
            positions[span] = np.arange(s.num_old, len(s.kv))
            q[span] = s.q
            kv_new[span] = s.given[s.num_old :]
        ragged = Ragged(
            positions=jnp.asarray(positions),
            kv_lens=jnp.asarray(kv_lens),
            query_starts=jnp.asarray(query_starts),
            page_table=jnp.asarray(page_table.astype(np.int32)),
            num_requests=jnp.asarray(len(self.sequences), jnp.int32),
            num_decode=jnp.asarray(self.num_decode, jnp.int32),
        )
        out, cache = jitted(
            jnp.asarray(q),
            jnp.asarray(kv_new),
            on_device(before),
            jnp.asarray(self.layer, jnp.int32),
            ragged,
            setting.config,
        )
        return np.asarray(out), cache, after

    def expected(self, **changes):
        """Returns f64 [t, N, H] of all requests in turn."""
        config = self.setting.config
        arguments = {
            "scale": config.scale,
            "window": config.windows[self.layer] if config.windows else None,
            "soft_cap": config.soft_cap,
            **changes,
        }
        outs = [
            oracle.attend(s.q, s.kv[:, :, 0], s.kv[:, :, 1], **arguments)
            for s in self.sequences
            if s.num_new
        ]
        empty = np.zeros((0, self.setting.N, self.setting.H))
        return np.concatenate([empty, *outs])

    @property
    def tolerance(self):
        largest = max(float(np.abs(s.kv[:, :, 1]).max()) for s in self.sequences)
        return 64 * np.finfo(np.float32).eps * largest

    def check(self):
        out, cache, after = self.call()
        expected = self.expected()
        assert out.dtype == np.float32
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out[: len(expected)], expected, rtol=0, atol=self.tolerance)
        oracle.assert_same_bits(cache, after)


def on_device(cache):
    scales = None if cache.scales is None else jnp.asarray(cache.scales)
    return PagedCache(values=jnp.asarray(cache.values), scales=scales)


@st.composite
def decode_lens(draw):
    count = draw(st.integers(1, B))
    kv_lens = draw(st.lists(lengths(1, MAX_LEN), min_size=count, max_size=count))
    return [(1, kv_len) for kv_len in kv_lens]


def lengths(least, most):
    """Lengths from least to most, page edges and their neighbours often."""
    edges = [n + d for n in range(0, most + 2, 16) for d in (-1, 0, 1)]
    edges = [n for n in edges if least <= n <= most]
    return st.integers(least, most) | st.sampled_from(edges or [least])


@st.composite
def mixed_batches(draw, num_tokens):
    """Decode rows, then rows of any number of queries, none and one included."""
    num_decode = draw(st.integers(0, B))
    lens = [(1, draw(lengths(1, MAX_LEN))) for _ in range(num_decode)]
    left = num_tokens - num_decode
    for _ in range(draw(st.integers(0 if lens else 1, B - num_decode))):
        num_new = draw(lengths(0, left))
        kv_len = draw(st.just(max(num_new, 1)) | lengths(max(num_new, 1), MAX_LEN))
        lens.append((num_new, kv_len))
        left -= num_new
    return lens, num_decode


def shareable(lens, page, wanted):
    """How many whole pages the first two requests may share: none that either writes to."""
    if len(lens) < 2:
        return 0
    return min(wanted, *((kv_len - num_new) // page for num_new, kv_len in lens[:2]))


@pytest.mark.parametrize("setting", MIXED, ids=lambda s: s.name)
def test_mixed_batches(setting):
    @given(
        batch=mixed_batches(setting.T),
        wanted=st.integers(0, 6),
        seed=st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=25)
    @example(batch=([(1, 1)], 1), wanted=0, seed=0)
    @example(batch=([(1, 1)], 0), wanted=0, seed=1)
    @example(batch=([(0, 7), (setting.T, setting.T)], 0), wanted=0, seed=2)
    @example(batch=([(0, 1), (0, 320)], 0), wanted=0, seed=3)
    @example(batch=([(1, 320), (1, 129), (1, 128), (1, 2), (1, 16)], 5), wanted=6, seed=4)
    @example(batch=([(1, 200), (1, 300), (9, 137), (0, 1), (15, 320)], 2), wanted=6, seed=5)
    def run(batch, wanted, seed):
        lens, num_decode = batch
        num_shared = shareable(lens, setting.page, wanted)
        Case(setting, lens, num_decode, num_shared, seed).check()

    run()


@pytest.mark.parametrize("setting", DECODE, ids=lambda s: s.name)
def test_decode_batches(setting):
    @given(lens=decode_lens(), wanted=st.integers(0, 6), seed=st.integers(0, 2**32 - 1))
    @settings(max_examples=25)
    @example(lens=[(1, 1)], wanted=0, seed=0)
    @example(lens=[(1, 320), (1, 320), (1, 129), (1, 128), (1, 1)], wanted=6, seed=1)
    def run(lens, wanted, seed):
        num_shared = shareable(lens, setting.page, wanted)
        Case(setting, lens, len(lens), num_shared, seed).check()

    run()


@pytest.mark.parametrize("setting", [MIXED[0], MIXED[5]], ids=lambda s: s.name)
def test_chunks_of_a_prompt_give_what_one_pass_gives(setting):
    """A prompt in chunks of 1, 47, 63 and 39, each continuing the cache that the last one left."""
    whole = Case(setting, [(150, 150)], 0, seed=7)
    sequence = whole.sequences[0]
    pages = np.full((B, setting.num_columns), setting.num_pages, np.int32)
    pages[0, : len(sequence.pages)] = sequence.pages
    cache = on_device(setting.poisoned_cache())
    outs = []
    start = 0
    for num_new in (1, 47, 63, 39):
        span = slice(start, start + num_new)
        pad = ((0, setting.T - num_new), (0, 0), (0, 0))
        ragged = Ragged(
            positions=jnp.asarray(np.pad(np.arange(start, span.stop), pad[0]), jnp.int32),
            kv_lens=jnp.asarray([span.stop, 0, 0, 0, 0], jnp.int32),
            query_starts=jnp.asarray([0] + [num_new] * B, jnp.int32),
            page_table=jnp.asarray(pages),
            num_requests=jnp.asarray(1, jnp.int32),
            num_decode=jnp.asarray(0, jnp.int32),
        )
        out, cache = jitted(
            jnp.asarray(np.pad(sequence.q[span], pad)),
            jnp.asarray(np.pad(sequence.given[span], (*pad, (0, 0)))),
            cache,
            jnp.asarray(whole.layer, jnp.int32),
            ragged,
            setting.config,
        )
        outs.append(np.asarray(out)[:num_new])
        start = span.stop
    np.testing.assert_allclose(np.concatenate(outs), whole.expected(), rtol=0, atol=whole.tolerance)
    _, in_one_pass, _ = whole.call()
    oracle.assert_same_bits(cache, in_one_pass)


def test_a_wrong_attention_would_be_seen():
    """The tolerance is far below what an off-by-one, a lost page or no scale comes to."""
    setting = MIXED[2]
    case = Case(setting, [(1, 200), (1, 30), (100, 150)], 2, seed=3)
    out, _, _ = case.call()
    right = case.expected()
    assert np.abs(out[: len(right)] - right).max() <= case.tolerance
    wrong = {
        "sees the next": case.expected(future=1),
        "misses itself": case.expected(future=-1),
        "window one wider": case.expected(window=2 * 37 + 1),
        "no scale": case.expected(scale=1.0),
    }
    case.sequences = [
        s.without_page(len(s.pages) - 2, setting.page) if s.num_new == 1 else s
        for s in case.sequences
    ]
    wrong["a lost page"] = case.expected()
    for fault, values in wrong.items():
        assert np.abs(values - right).max() > 1000 * case.tolerance, fault


def test_wrong_scales_would_be_seen():
    """The tolerance is far below what a neighbour's scales, a key's for a value or none come to."""
    setting = MIXED[5]
    case = Case(setting, [(1, 200), (1, 30), (100, 150)], 2, seed=3)
    out, _, _ = case.call()
    right, sequences = case.expected(), case.sequences
    assert np.abs(out[: len(right)] - right).max() <= case.tolerance

    def expected_with(change):
        case.sequences = []
        for s in sequences:
            rows, scales = oracle.held(s.given, INT8)
            case.sequences.append(replace(s, kv=rows * change(scales)[..., None]))
        return case.expected()

    np.testing.assert_array_equal(expected_with(lambda scales: scales), right)
    wrong = {
        "the scales of the row before": expected_with(lambda scales: np.roll(scales, 1, axis=0)),
        "another head's": expected_with(lambda scales: np.roll(scales, 1, axis=1)),
        "keys' for values and values' for keys": expected_with(lambda scales: scales[..., ::-1]),
        "one for all": expected_with(lambda scales: np.full_like(scales, scales.max())),
    }
    case.sequences = [replace(s, kv=s.given) for s in sequences]
    wrong["not rounded"] = case.expected()
    for fault, values in wrong.items():
        assert np.abs(values - right).max() > 100 * case.tolerance, fault


def one_token():
    return Ragged(
        positions=jnp.zeros(1, jnp.int32),
        kv_lens=jnp.ones(1, jnp.int32),
        query_starts=jnp.asarray([0, 1], jnp.int32),
        page_table=jnp.zeros((1, 1), jnp.int32),
        num_requests=jnp.asarray(1, jnp.int32),
        num_decode=jnp.asarray(1, jnp.int32),
    )


def test_heads_must_match():
    setting = MIXED[0]
    case = Case(setting, [(1, 1)], 1)
    ragged = one_token()
    layer = jnp.asarray(0, jnp.int32)
    cache = PagedCache(values=jnp.zeros((1, 1, 2, 2, 16, 16)))
    with pytest.raises(ValueError, match="3 query heads over 2 key heads"):
        paged_attention(
            jnp.zeros((1, 3, 16)), jnp.zeros((1, 2, 2, 16)), cache, layer, ragged,
            case.setting.config,
        )  # fmt: skip
    with pytest.raises(ValueError, match="heads must match"):
        paged_attention(
            jnp.zeros((1, 2, 8)), jnp.zeros((1, 2, 2, 8)), cache, layer, ragged,
            case.setting.config,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [("windows", (0,)), ("windows", (None, -3)), ("soft_cap", 0.0), ("soft_cap", -1.0)],
)
def test_a_config_without_meaning_is_refused(field, value):
    with pytest.raises(
        ValueError, match=rf"got {field}={re.escape(str(value))}; (it|each) must be"
    ):
        AttentionConfig(scale=1.0, **{field: value})


def test_a_window_for_each_layer():
    config = AttentionConfig(scale=1.0, windows=(3,))
    with pytest.raises(ValueError, match="1 windows for 2 layers"):
        paged_attention(
            jnp.zeros((1, 1, 16)),
            jnp.zeros((1, 1, 2, 16)),
            PagedCache(values=jnp.zeros((L, 1, 1, 2, 16, 16))),
            jnp.asarray(0, jnp.int32),
            one_token(),
            config,
        )
