"""Log-probabilities of sampled and of prompt tokens, against float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from pallasite.engine.sampler import sample, score_tokens
from pallasite.engine.sampler_state import init_state
from tests.engine import sampler_oracle as oracle
from tests.engine.neutral_rows import neutral_rows

V = 257


def random_logits(rng, num_rows):
    return (rng.standard_normal((num_rows, V)) * 3).astype(np.float32)


def assert_scores(logits, token_ids, scores, tolerance):
    logprob, top_ids, top_logprobs = scores
    assert np.isfinite(logprob).all()
    for i, token_id in enumerate(token_ids):
        expected = oracle.log_softmax(logits[i])
        best = np.argsort(-logits[i], kind="stable")[:20]
        np.testing.assert_allclose(logprob[i], expected[token_id], atol=tolerance)
        np.testing.assert_array_equal(top_ids[i], best)
        np.testing.assert_allclose(top_logprobs[i], expected[best], atol=tolerance)


def test_logprobs_are_of_the_model_before_any_processing(rng):
    logits = random_logits(rng, 2)
    bias = np.zeros((2, V), np.float32)
    bias[0, 7] = 90.0
    rows = replace(
        neutral_rows(2, 0),
        temperature=np.float32([0.2, 0.0]),
        top_k=np.int32([3, 0]),
        has_bias=np.asarray([True, False]),
        slot=np.int32([0, 1]),
        num_logprobs=np.int32([20, 0]),
    )
    state = replace(init_state(2, V), bias=jnp.asarray(bias))
    is_live = jnp.ones((2,), jnp.bool_)
    _, sampled = jax.device_get(jax.jit(sample)(jnp.asarray(logits), rows, state, is_live))
    assert sampled.token_ids.tolist() == [7, logits[1].argmax()]
    scores = (sampled.logprob, sampled.top_ids, sampled.top_logprobs)
    assert_scores(logits, sampled.token_ids, scores, 2e-5)


def test_prompt_tokens_are_scored(rng):
    # Far from zero, where exp would overflow and f32 holds 3e-5 at best.
    logits = random_logits(rng, 5) + np.float32(500)
    targets = rng.integers(0, V, 5).astype(np.int32)
    scores = jax.device_get(score_tokens(jnp.asarray(logits), jnp.asarray(targets)))
    assert_scores(logits, targets, scores, 2e-4)


def test_a_vocabulary_smaller_than_twenty_is_padded():
    logprob, top_ids, top_logprobs = score_tokens(jnp.zeros((1, 4)), jnp.zeros((1,), jnp.int32))
    np.testing.assert_allclose(logprob, [-np.log(4)], rtol=1e-6)
    assert top_ids[0].tolist() == [0, 1, 2, 3] + [-1] * 16
    np.testing.assert_allclose(top_logprobs[0], [-np.log(4)] * 4 + [-np.inf] * 16, rtol=1e-6)
