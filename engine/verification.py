"""Verifying drafts within a step: every token of a row is sampled after, as it would be by itself.

A row feeds a token and then drafted ones. What is sampled after each of them has the row's own seed
and parameters, the place in the completion that it would have, and the counts, with the drafts
before it. So a draft changes no token: it is right where it equals what is sampled before it, and
what comes after a wrong one is dropped. (Speculative decoding as in Leviathan et al. 2023, for a
draft that is certain of each token, with the target's draw fixed by its key.)
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallasite.engine.layout import SAMPLING_FIELDS, StepInputs
from pallasite.engine.sampler import SamplingRows
from pallasite.engine.sampler_state import SamplerState
from pallasite.pallas_kernels.paged_attention import Ragged


def drafts_of(
    token_ids: Int[Array, "T"], ragged: Ragged, num_drafts: int
) -> Int[Array, "B num_drafts"]:
    """Returns the tokens of each row after its first one, -1 beyond its end."""
    place = jnp.arange(num_drafts, dtype=jnp.int32)[None, :]
    places = ragged.query_starts[:-1, None] + 1 + place
    is_own = places < ragged.query_starts[1:, None]
    return jnp.where(is_own, token_ids.at[places].get(mode="clip"), -1)


def each_token(
    inputs: StepInputs, drafts: Int[Array, "B K"], token_ids: Int[Array, "T"]
) -> tuple[SamplingRows, Bool[Array, "T"]]:
    """Returns how to sample after each token, and after which ones to."""
    rows, starts = inputs.rows, inputs.ragged.query_starts
    token = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    row = jnp.sum(token[:, None] >= starts[None, 1:], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, drafts.shape[0] - 1)  # of the padding
    place = jnp.arange(drafts.shape[1], dtype=jnp.int32)[None, :]
    fields = {name: getattr(rows, name)[row] for name in (*SAMPLING_FIELDS, "slot")}
    tokens = replace(
        rows,
        **fields,
        # A row's own is that of its last token.
        output_index=rows.output_index[row] - (starts[row + 1] - 1 - token),
        last_token=token_ids,
        drafts=jnp.where(place < (token - starts[row])[:, None], drafts[row], -1),
    )
    return tokens, (token < starts[-1]) & inputs.samples[row]


def accept(
    inputs: StepInputs,
    drafts: Int[Array, "B K"],
    state: SamplerState,
    sampled: Int[Array, "T"],
) -> SamplerState:
    """Returns the state after the drafts that are right: those before the first wrong one.

    A slot's last token is what was sampled after them, and they are counted.
    """
    num_rows, num_drafts = drafts.shape
    place = jnp.arange(num_drafts + 1, dtype=jnp.int32)[None, :]
    own = sampled.at[inputs.ragged.query_starts[:-1, None] + place].get(mode="clip")
    is_right = jnp.cumprod(drafts == own[:, :num_drafts], axis=1, dtype=jnp.int32)
    last = own[jnp.arange(num_rows, dtype=jnp.int32), jnp.sum(is_right, axis=1)]
    slots = jnp.where(inputs.samples, inputs.rows.slot, state.last_token.shape[0])
    counted = jnp.where(is_right == 1, drafts, state.counts.shape[1])
    return replace(
        state,
        last_token=state.last_token.at[slots].set(last, mode="drop"),
        counts=state.counts.at[slots[:, None], counted].add(1, mode="drop"),
    )
