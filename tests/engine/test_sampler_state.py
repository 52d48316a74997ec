"""Slots: what fills them, what counts in them, and that no program copies them."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallasite.engine.request import SamplingParams
from pallasite.engine.sampler import sample
from pallasite.engine.sampler_state import (
    SamplerState,
    SlotEdit,
    count_fed,
    edit_slot,
    has_bias,
    has_penalty,
    init_state,
    slot_edits,
)
from tests.engine.neutral_rows import neutral_rows

S, V = 4, 257
jitted_edit = jax.jit(edit_slot)


def stale_state(rng):
    """What earlier requests may have left behind."""
    return SamplerState(
        last_token=jnp.asarray(rng.integers(0, V, S), jnp.int32),
        counts=jnp.asarray(rng.integers(0, 5, (S, V)), jnp.int32),
        is_seen=jnp.asarray(rng.integers(0, 2, (S, V)) > 0),
        bias=jnp.asarray(rng.standard_normal((S, V)), jnp.float32),
    )


def edited(state, edits):
    for edit in edits:
        state = jitted_edit(state, edit)
    return jax.device_get(state)


@pytest.mark.parametrize("chunk_len", [1, 7, 64, 1024])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(frequency_penalty=0.5),
        SamplingParams(logit_bias={3: -2.5, 256: 100.0, 0: 1.0}),
        SamplingParams(allowed_token_ids=(9, 0, 256), logit_bias={9: 2.0, 10: 50.0}),
        SamplingParams(
            allowed_token_ids=tuple(range(0, V, 2)), presence_penalty=1.0, repetition_penalty=0.5
        ),
    ],
    ids=["repetition", "frequency", "bias", "allowed and bias", "all"],
)
def test_edits_make_a_slot_what_the_request_says(rng, params, chunk_len):
    prompt_ids = rng.integers(0, V, 300).tolist()
    output_ids = rng.integers(0, 40, 500).tolist()
    before = stale_state(rng)
    after = edited(before, slot_edits(params, prompt_ids, output_ids, 2, chunk_len))

    expected = jax.tree.map(np.array, jax.device_get(before))
    expected.counts[2], expected.is_seen[2] = 0, False
    if has_penalty(params):
        for token_id, count in Counter(output_ids).items():
            expected.counts[2, token_id] = count
    if params.repetition_penalty != 1.0:
        expected.is_seen[2, prompt_ids] = True
    expected.bias[2] = 0.0 if params.allowed_token_ids is None else -np.inf
    for token_id in range(V) if params.allowed_token_ids is None else params.allowed_token_ids:
        expected.bias[2, token_id] = params.logit_bias.get(token_id, 0.0)
    jax.tree.map(np.testing.assert_array_equal, after, expected)


def test_edits_have_the_shapes_of_one_program():
    params = SamplingParams(repetition_penalty=2.0)
    edits = slot_edits(params, list(range(10)), [], 1, 4)
    assert [edit.token_ids.tolist() for edit in edits] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, -1, -1],
    ]
    assert [bool(edit.resets) for edit in edits] == [True, False, False]
    shapes = {str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), edit)) for edit in edits}
    assert len(shapes) == 1


def test_an_unused_entry_changes_nothing_whatever_it_says(rng):
    before = stale_state(rng)
    edit = SlotEdit(
        slot=np.asarray(1, np.int32),
        resets=np.asarray(False),
        bias_fill=np.asarray(0.0, np.float32),
        token_ids=np.int32([-1, 5]),
        marks_seen=np.asarray([True, False]),
        adds_count=np.int32([3, 4]),
        sets_bias=np.asarray([True, False]),
        bias=np.float32([9.0, 9.0]),
    )
    after = edited(before, [edit])
    expected = jax.tree.map(np.array, jax.device_get(before))
    expected.counts[1, 5] += 4
    jax.tree.map(np.testing.assert_array_equal, after, expected)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=3, min_p=0.1, seed=1)])
def test_a_request_without_penalty_or_bias_needs_no_edit(params):
    assert slot_edits(params, [1, 2], [3], 0, 8) == []
    assert not has_bias(params)
    assert not has_penalty(params)


def test_an_empty_history_still_resets_the_slot(rng):
    after = edited(stale_state(rng), slot_edits(SamplingParams(presence_penalty=1.0), [], [], 3, 8))
    assert after.counts[3].sum() == 0
    assert after.is_seen[3].sum() == 0
    np.testing.assert_array_equal(after.bias[3], np.zeros(V))


def test_fed_tokens_are_counted_where_asked(rng):
    before = stale_state(rng)
    slots = jnp.asarray([3, 0, 1, 3, 2], jnp.int32)
    tokens = jnp.asarray([7, 7, 256, 7, 9], jnp.int32)
    after = count_fed(before, slots, tokens, jnp.asarray([True, False, True, True, False]))
    difference = np.asarray(after.counts) - np.asarray(before.counts)
    assert {(*at, int(difference[*at])) for at in np.argwhere(difference).tolist()} == {
        (3, 7, 2),
        (1, 256, 1),
    }


def step(logits, rows, state, is_live):
    """A step in small: tokens are counted, then the next ones sampled."""
    state = count_fed(state, rows.slot, state.last_token[rows.slot], is_live)
    return sample(logits * 0.5, rows, state, is_live)


@pytest.mark.parametrize("program", ["step", "edit"])
def test_no_program_copies_the_state(program):
    num_slots, vocab_size, num_rows = 24, 2048, 8
    state = jax.eval_shape(lambda: init_state(num_slots, vocab_size))
    if program == "step":
        logits = jax.ShapeDtypeStruct((num_rows, vocab_size), jnp.float32)
        is_live = jax.ShapeDtypeStruct((num_rows,), jnp.bool_)
        rows = neutral_rows(num_rows, 3)
        lowered = jax.jit(step, donate_argnums=2).lower(logits, rows, state, is_live)
    else:
        edit = slot_edits(SamplingParams(logit_bias={1: 1.0}), [], [], 0, 16)[0]
        lowered = jax.jit(edit_slot, donate_argnums=0).lower(state, edit)
    compiled = lowered.compile()
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= num_bytes
    shape = rf"\[{num_slots},{vocab_size}\]"
    text = compiled.as_text()
    assert re.search(shape, text)
    assert re.findall(rf".*{shape}\S* copy\(.*", text) == []


def test_a_state_that_is_not_donated_is_copied():
    """So that the test above can fail."""
    state = jax.eval_shape(lambda: init_state(24, 2048))
    edit = slot_edits(SamplingParams(logit_bias={1: 1.0}), [], [], 0, 16)[0]
    text = jax.jit(edit_slot).lower(state, edit).compile().as_text()
    assert re.findall(r".*\[24,2048\]\S* copy\(.*", text)
