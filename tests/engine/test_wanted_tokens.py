"""A prompt's last layer goes on with its last token alone, unless the prompt is scored."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallasite.engine import EngineConfig, bursts
from pallasite.pallas_kernels.cpu import best_instructions
from pallasite.pallas_kernels.quantized_matmul import Fused, fused_matmul
from tests.engine.harness import MAIN, greedy, random_prompt, taken_in_together

pytestmark = pytest.mark.skipif(
    not best_instructions(), reason="this installation has no bodies for the CPU"
)
CONFIG = replace(MAIN, quantize=(("", "q8_0"),))


@pytest.mark.parametrize("max_batch_tokens", [64, 16])
def test_answers_are_those_of_a_prompt_that_is_scored(engines, rng, max_batch_tokens, monkeypatch):
    config: EngineConfig = replace(CONFIG, max_batch_tokens=max_batch_tokens)
    prompts = [random_prompt(rng, int(rng.integers(1, 60))) for _ in range(20)]
    # Which requests a step has together is a matter of counts alone, and the same both times. XLA
    # sums a norm's squares in another order in the program of another size.
    monkeypatch.setattr(bursts, "LONGEST_S", 0.0)
    with engines.fresh(config) as engine:
        plain = [greedy(prompt, max_tokens=5, logprobs=5) for prompt in prompts]
        scored = [replace(one, params=replace(one.params, prompt_logprobs=0)) for one in plain]
        for one, other in zip(plain, scored, strict=True):
            (ours,), (theirs,) = engine.generate([one]), engine.generate([other])
            assert ours.token_ids == theirs.token_ids
            assert ours.logprobs == theirs.logprobs
        both = [taken_in_together(engine, requests, monkeypatch) for requests in (plain, scored)]
        for ours, theirs in zip(*both, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.logprobs == theirs.logprobs


def test_rows_of_a_tile_with_a_wanted_one_are_those_of_all(engines, rng):
    with engines.fresh(CONFIG) as engine:
        matrix = engine._runtime._spec.model.layers.ffn.down.product()
    layer = jnp.int32(1)
    matrix = replace(matrix, layer=layer)
    x = jnp.asarray(rng.standard_normal((50, matrix.num_inputs), np.float32))
    wanted = jnp.zeros(50, jnp.bool_).at[jnp.array([13, 49])].set(True)
    is_computed = np.zeros(50, np.bool_)
    is_computed[12:24] = is_computed[48:] = True
    every = jax.jit(lambda x: fused_matmul(x, [matrix], Fused()))(x)
    x = x.at[~is_computed].set(jnp.nan)
    some = jax.jit(lambda x: fused_matmul(x, [matrix], Fused(wanted=wanted)))(x)
    np.testing.assert_array_equal(some[is_computed], every[is_computed])
    assert np.asarray(every)[is_computed].any(axis=1).all()
