"""Verifying drafts on the device: each token as the sampler alone would, and the state after."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallasite.engine.layout import StepInputs
from pallasite.engine.sampler import sample
from pallasite.engine.sampler_state import SamplerState
from pallasite.engine.verification import accept, drafts_of, each_token
from pallasite.pallas_kernels.paged_attention import Ragged
from tests.engine.neutral_rows import neutral_rows

S, V, K, T, B = 5, 40, 3, 12, 4
W = 2
LENGTHS = (1, 1, 4, 3)
"""Of four rows, single tokens first; the last three tokens are padding."""


@pytest.fixture
def state(rng):
    return SamplerState(
        last_token=jnp.asarray(rng.integers(0, V, S), jnp.int32),
        counts=jnp.asarray(rng.integers(0, 3, (S, V)), jnp.int32),
        is_seen=jnp.asarray(rng.integers(0, 2, (S, V)) > 0),
        bias=jnp.asarray(rng.standard_normal((S, V)), jnp.float32),
    )


def inputs_of(rng, samples=(True,) * B):
    """Rows with every parameter, in slots of their own."""
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    rows = neutral_rows(B, W)
    rows = replace(
        rows,
        temperature=np.array([0.0, 0.7, 1.2, 0.0], np.float32),
        top_k=np.array([0, 9, 0, 0], np.int32),
        top_p=np.array([1.0, 1.0, 0.8, 1.0], np.float32),
        repetition_penalty=np.array([1.0, 1.2, 1.5, 0.7], np.float32),
        presence_penalty=np.array([0.5, 0.0, 0.9, -0.5], np.float32),
        frequency_penalty=np.array([0.0, 0.3, 0.7, 1.5], np.float32),
        seed=rng.integers(0, 2**31, B).astype(np.int32),
        output_index=np.array([4, 0, 7, 3], np.int32),
        slot=np.array([3, 0, 4, 1], np.int32),
        has_bias=np.array([True, False, True, False]),
        bans=rng.integers(-1, V, (T, W, 2)).astype(np.int32),
    )
    ragged = Ragged(
        positions=jnp.zeros(T, jnp.int32),
        kv_lens=jnp.zeros(B, jnp.int32),
        query_starts=jnp.asarray(starts),
        page_table=jnp.zeros((B, 1), jnp.int32),
        num_requests=jnp.int32(B),
        num_decode=jnp.int32(2),
    )
    return StepInputs(
        token_ids=jnp.zeros(T, jnp.int32),
        ragged=ragged,
        adapter_slots=jnp.zeros(B, jnp.int32),
        takes_previous=jnp.zeros(B, jnp.bool_),
        samples=jnp.array(samples),
        rows=rows,
        targets=jnp.zeros(T, jnp.int32),
        wants_scores=jnp.bool_(False),
        num_steps=jnp.int32(1),
    )


@jax.jit
def verify(inputs, token_ids, logits, state):
    drafts = drafts_of(token_ids, inputs.ragged, K)
    rows, is_live = each_token(inputs, drafts, token_ids)
    _, sampled = sample(logits, rows, state, is_live)
    return accept(inputs, drafts, state, sampled.token_ids), sampled, is_live


sample_one = jax.jit(sample)


def alone(inputs, row, offset, token_ids, logits, state):
    """What the sampler gives after one token, whose slot has counted all before it."""
    start = int(inputs.ragged.query_starts[row])
    place, slot = start + offset, int(inputs.rows.slot[row])
    counts = np.array(state.counts)
    for token_id in token_ids[start + 1 : place + 1]:
        counts[slot, token_id] += 1
    own = {
        name: np.asarray(value)[row : row + 1]
        for name, value in vars(inputs.rows).items()
        if name not in ("bans", "drafts")
    }
    own["output_index"] = own["output_index"] - (LENGTHS[row] - 1 - offset)
    own["last_token"] = token_ids[place : place + 1]
    rows = replace(
        inputs.rows,
        **own,
        bans=inputs.rows.bans[place : place + 1],
        drafts=np.zeros((1, 0), np.int32),
    )
    state = replace(state, counts=jnp.asarray(counts))
    is_live = jnp.ones(1, jnp.bool_)
    return jax.device_get(sample_one(logits[place : place + 1], rows, state, is_live)[1])


def foreseen(rng, inputs, logits, state, num_right):
    """Token ids whose drafts are right for so many tokens of each row."""
    token_ids = rng.integers(0, V, T).astype(np.int32)
    for row, right in enumerate(num_right):
        start = int(inputs.ragged.query_starts[row])
        for offset in range(LENGTHS[row] - 1):
            said = alone(inputs, row, offset, token_ids, logits, state).token_ids[0]
            wrong = (said + 1) % V
            token_ids[start + offset + 1] = said if offset < right else wrong
    return token_ids


@pytest.mark.parametrize("num_right", [(0, 0, 0, 0), (0, 0, 1, 2), (0, 0, 2, 1), (0, 0, 3, 2)])
def test_every_token_is_sampled_as_it_would_be_alone_and_right_drafts_are_counted(
    rng, state, num_right
):
    inputs = inputs_of(rng)
    logits = jnp.asarray(rng.standard_normal((T, V)) * 3, jnp.float32)
    token_ids = foreseen(rng, inputs, logits, state, num_right)
    after, sampled, is_live = jax.device_get(verify(inputs, token_ids, logits, state))
    assert is_live.tolist() == [True] * sum(LENGTHS) + [False] * (T - sum(LENGTHS))
    expected_last, expected_counts = np.array(state.last_token), np.array(state.counts)
    for row, right in enumerate(num_right):
        start, slot = int(inputs.ragged.query_starts[row]), int(inputs.rows.slot[row])
        for offset in range(LENGTHS[row]):
            one = alone(inputs, row, offset, token_ids, logits, state)
            assert sampled.token_ids[start + offset] == one.token_ids[0], (row, offset)
            assert sampled.status[start + offset] == one.status[0]
        expected_last[slot] = sampled.token_ids[start + right]
        for token_id in token_ids[start + 1 : start + 1 + right]:
            expected_counts[slot, token_id] += 1
    np.testing.assert_array_equal(after.last_token, expected_last)
    np.testing.assert_array_equal(after.counts, expected_counts)
    np.testing.assert_array_equal(after.bias, state.bias)


def test_a_row_that_samples_nothing_and_padding_leave_the_state_alone(rng, state):
    inputs = inputs_of(rng, samples=(False, True, False, False))
    logits = jnp.asarray(rng.standard_normal((T, V)), jnp.float32)
    token_ids = rng.integers(0, V, T).astype(np.int32)
    after, _, is_live = jax.device_get(verify(inputs, token_ids, logits, state))
    assert np.flatnonzero(is_live).tolist() == [1]
    np.testing.assert_array_equal(after.counts, state.counts)
    changed = np.flatnonzero(after.last_token != np.asarray(state.last_token))
    assert set(changed.tolist()) <= {int(inputs.rows.slot[1])}


def test_drafts_are_a_rows_tokens_after_its_first(rng):
    token_ids = jnp.arange(100, 100 + T, dtype=jnp.int32)
    drafts = drafts_of(token_ids, inputs_of(rng).ragged, K)
    assert drafts.tolist() == [[-1] * 3, [-1] * 3, [103, 104, 105], [107, 108, -1]]
