"""Low-rank changes of a batch, gathered or masked, against each token's own product in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallasite.models.lora import LowRank, adapter_key, batch_adapters
from pallasite.models.registry import make_model
from pallasite.pallas_kernels.paged_attention import Ragged
from pallasite.pallas_kernels.target import CPU
from tests.tiny_checkpoints import TINY

NUM_SLOTS, RANK, LAYER = 3, 2, 1


def ragged_of(counts):
    starts = np.concatenate(([0], np.cumsum(counts)))
    num_tokens = int(starts[-1])
    return Ragged(
        positions=jnp.zeros(num_tokens, jnp.int32),
        kv_lens=jnp.ones(len(counts), jnp.int32),
        query_starts=jnp.asarray(starts, jnp.int32),
        page_table=jnp.zeros((len(counts), 1), jnp.int32),
        num_requests=jnp.asarray(len(counts), jnp.int32),
        num_decode=jnp.asarray(0, jnp.int32),
    )


@pytest.mark.parametrize(
    ("counts", "padding"),
    [([1, 1, 1, 1], 0), ([1, 1, 1, 1], 2), ([2, 1, 2, 1], 0), ([9, 4, 1, 1], 0), ([3, 3, 2, 1], 5)],
)
def test_each_token_is_changed_by_its_own_adapter_alone(counts, padding):
    """Up to twice the slots a batch gathers; beyond, it masks."""
    rng = np.random.default_rng(0)
    matrix = make_model(TINY, "f32", CPU).layers.ffn.gate
    num_inputs, num_outputs = TINY.model_width, TINY.ffn_width
    a = rng.standard_normal((2, NUM_SLOTS * RANK, num_inputs), np.float32)
    b = rng.standard_normal((2, NUM_SLOTS * RANK, num_outputs), np.float32)
    key = adapter_key(matrix.source)
    adapters = {key: LowRank(a=jnp.asarray(a), b=jnp.asarray(b), is_used=jnp.ones(3, bool))}
    row_slots = [2, -1, 0, 2]
    num_tokens = sum(counts) + padding
    batch = batch_adapters(adapters, jnp.asarray(row_slots), ragged_of(counts), num_tokens)
    x = rng.standard_normal((num_tokens, num_inputs), np.float32)
    change = np.asarray(batch.change(jnp.asarray(x), matrix, jnp.asarray(LAYER)))

    slots = [*np.repeat(row_slots, counts), *[-1] * padding]
    expected = np.zeros((num_tokens, num_outputs))
    for token, slot in enumerate(slots):
        if slot >= 0:
            own = slice(slot * RANK, (slot + 1) * RANK)
            inner = a[LAYER, own].astype(np.float64) @ x[token]
            expected[token] = inner @ b[LAYER, own].astype(np.float64)
    scale = np.abs(expected).max()
    assert scale > 10
    np.testing.assert_allclose(change, expected, rtol=0, atol=1e-5 * scale)
    assert (change[np.array(slots) < 0] == 0).all()


def test_a_matrix_that_no_row_changes_adds_nothing():
    matrix = make_model(TINY, "f32", CPU).layers.ffn.gate
    key = adapter_key(matrix.source)
    ones = LowRank(
        a=jnp.ones((2, NUM_SLOTS * RANK, TINY.model_width)),
        b=jnp.ones((2, NUM_SLOTS * RANK, TINY.ffn_width)),
        is_used=jnp.asarray([True, False, True]),
    )
    x = jnp.ones((3, TINY.model_width))
    for row_slots, changes in (([1, 1, -1], False), ([1, 2, -1], True)):
        batch = batch_adapters({key: ones}, jnp.asarray(row_slots), ragged_of([1, 1, 1]), 3)
        assert bool(batch.is_used[key]) is changes
        assert bool(np.any(np.asarray(batch.change(x, matrix, jnp.asarray(0))))) is changes
