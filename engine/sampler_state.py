"""What sampling remembers of each request on the device, one row a slot, and how one is filled.

A slot is a running completion's place for as long as it runs; its row in the batch may change from
step to step. Nothing here chooses tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int32

from pallasite.engine.request import SamplingParams

# The fields of these dataclasses are typed Any: the same trees also hold abstract shapes, shardings
# and donation flags while a program is lowered.


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplerState:
    """The device's memory of S slots over a vocabulary of V; donated through the step.

    Attributes:
        last_token: i32[S], the slot's last sample.
        counts: i32[S, V], how often each token stands in the completion as far as it was fed.
        is_seen: bool[S, V], whether each token stands in the prompt.
        bias: f32[S, V], added to the logits.
    """

    last_token: Any
    counts: Any
    is_seen: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotEdit:
    """One change of one slot: a reset if asked for, then up to C tokens. No token stands twice.

    Attributes:
        slot: i32[].
        resets: bool[], whether the slot is emptied first.
        bias_fill: f32[], the bias of every token after a reset: 0, or -inf where only
            allowed_token_ids may be sampled.
        token_ids: i32[C], -1 for an unused entry.
        marks_seen: bool[C], whether the token stands in the prompt.
        adds_count: i32[C], added to the token's count.
        sets_bias: bool[C], whether `bias` replaces the token's bias.
        bias: f32[C].
    """

    slot: Any
    resets: Any
    bias_fill: Any
    token_ids: Any
    marks_seen: Any
    adds_count: Any
    sets_bias: Any
    bias: Any


def init_state(num_slots: int, vocab_size: int) -> SamplerState:
    """Returns the state of empty slots; under `jax.eval_shape`, its shapes alone."""
    shape = (num_slots, vocab_size)
    return SamplerState(
        last_token=jnp.zeros((num_slots,), jnp.int32),
        counts=jnp.zeros(shape, jnp.int32),
        is_seen=jnp.zeros(shape, jnp.bool_),
        bias=jnp.zeros(shape, jnp.float32),
    )


def edit_slot(state: SamplerState, edit: SlotEdit) -> SamplerState:
    """Returns the state with one edit applied, in place where the state is donated.

    A slot beyond the last is none: nothing changes.
    """
    slot, resets = edit.slot, edit.resets
    vocab_size = state.counts.shape[1]

    def emptied(rows: Array, fill: Array) -> Array:
        return rows.at[slot].set(jnp.where(resets, fill, rows[slot]), mode="drop")

    def chosen(applies: Array) -> Array:
        # Beyond the vocabulary mode="drop" leaves an entry out; -1 would count from the end.
        return jnp.where(applies & (edit.token_ids >= 0), edit.token_ids, vocab_size)

    counts = emptied(state.counts, jnp.int32(0))
    is_seen = emptied(state.is_seen, jnp.bool_(False))
    bias = emptied(state.bias, edit.bias_fill)
    return SamplerState(
        last_token=state.last_token,
        counts=counts.at[slot, chosen(edit.adds_count != 0)].add(edit.adds_count, mode="drop"),
        is_seen=is_seen.at[slot, chosen(edit.marks_seen)].set(True, mode="drop"),
        bias=bias.at[slot, chosen(edit.sets_bias)].set(edit.bias, mode="drop"),
    )


def count_fed(
    state: SamplerState,
    slots: Int32[Array, "B"],
    tokens: Int32[Array, "B"],
    counts_it: Bool[Array, "B"],
) -> SamplerState:
    """Returns the state with one more of tokens[b] in slots[b] where counts_it[b].

    For tokens that the device fed from its own last sample: the host, which lists a slot's earlier
    tokens in `slot_edits`, has not read them yet.
    """
    rows = jnp.where(counts_it, slots, state.counts.shape[0])
    counts = state.counts.at[rows, tokens].add(1, mode="drop")
    return SamplerState(
        last_token=state.last_token, counts=counts, is_seen=state.is_seen, bias=state.bias
    )


def has_bias(params: SamplingParams) -> bool:
    """Returns whether a request's rows read their slot's bias (`SamplingRows.has_bias`)."""
    return bool(params.logit_bias) or params.allowed_token_ids is not None


def has_penalty(params: SamplingParams) -> bool:
    """Returns whether a request's rows read their slot's counts, which must then be kept."""
    penalties = (params.presence_penalty, params.frequency_penalty)
    return params.repetition_penalty != 1.0 or penalties != (0.0, 0.0)


def slot_edits(
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    slot: int,
    chunk_len: int,
) -> list[SlotEdit]:
    """Returns the edits, of numpy arrays, that a request needs when it enters a slot.

    Empty where it has neither a penalty nor a bias: what an earlier request left in the slot does
    not reach it, since its rows have no bias and neutral penalties.

    Args:
        output_ids: the completion so far; not empty where the request was preempted or resumed.
        chunk_len: C, tokens an edit.
    """
    if not has_bias(params) and not has_penalty(params):
        return []
    allowed = params.allowed_token_ids
    biased = tuple(params.logit_bias) if allowed is None else allowed
    bias = {token_id: params.logit_bias.get(token_id, 0.0) for token_id in biased}
    seen = _unique(prompt_ids if params.repetition_penalty != 1.0 else ())
    counted, counts = np.unique(
        np.asarray(output_ids if has_penalty(params) else (), np.int32), return_counts=True
    )
    token_ids = np.unique(np.concatenate([seen, counted, _unique(tuple(bias))]))
    adds_count = np.zeros(token_ids.shape, np.int32)
    adds_count[np.searchsorted(token_ids, counted)] = counts
    marks_seen = np.isin(token_ids, seen)
    sets_bias = np.asarray([token_id in bias for token_id in token_ids.tolist()], np.bool_)
    values = np.asarray([bias.get(token_id, 0.0) for token_id in token_ids.tolist()], np.float32)

    def chunk(start: int) -> SlotEdit:
        part = slice(start, start + chunk_len)
        return SlotEdit(
            slot=np.asarray(slot, np.int32),
            resets=np.asarray(start == 0, np.bool_),
            bias_fill=np.asarray(0.0 if allowed is None else -np.inf, np.float32),
            token_ids=_padded(token_ids[part], chunk_len, -1),
            marks_seen=_padded(marks_seen[part], chunk_len, 0),
            adds_count=_padded(adds_count[part], chunk_len, 0),
            sets_bias=_padded(sets_bias[part], chunk_len, 0),
            bias=_padded(values[part], chunk_len, 0),
        )

    return [chunk(start) for start in range(0, max(1, len(token_ids)), chunk_len)]


def _unique(token_ids: Sequence[int]) -> np.ndarray:
    return np.unique(np.asarray(token_ids, np.int32))


def _padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    return np.pad(values, (0, length - len(values)), constant_values=fill)
