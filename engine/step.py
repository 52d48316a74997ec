"""The step: one program a bucket, from the last step's samples to this one's.

Weights, cache and sampler state come in and go out; cache and state are donated here and nowhere
else. The program runs on a mesh by `jax.shard_map`: what is written here is what one device does
for its data shard, with its part of the weights and of the cache.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallasite.engine.layout import Layout, StepInputs
from pallasite.engine.sampler import NUM_TOP, Sampled, sample, score_tokens
from pallasite.engine.sampler_state import SamplerState, count_fed
from pallasite.engine.verification import accept, drafts_of, each_token
from pallasite.models.decoder import Decoder, forward, unembed
from pallasite.models.lora import Adapters, batch_adapters
from pallasite.pallas_kernels.paged_attention import PagedCache

SCORED_AT_ONCE = 64
"""Prompt tokens whose logits stand in memory together while a prompt is scored."""

RESULT_WIDTH = 3 + 2 * NUM_TOP
"""Words a row of the result: token id, status, log-probability, top ids, top log-probabilities."""

StepFunction = Callable[
    [list[jax.Array], Adapters, PagedCache, SamplerState, Int[Array, "1 W"]],
    tuple[PagedCache, SamplerState, Int[Array, "1 S B R"], Int[Array, "1 T R"]],
]


def make_step(structure: jax.tree_util.PyTreeDef, layout: Layout) -> StepFunction:
    """Returns what each device does in the step of one bucket, for `jax.shard_map`.

    It maps (weights, adapters, cache, sampler state, words of `layout`) to (cache, sampler state,
    results [1, S, B, RESULT_WIDTH] of each step's rows, scores [1, T, RESULT_WIDTH] of the
    prompts), all results as i32 words. Its data shard's are the first axis's one entry. `structure`
    puts the leaves `weights` together to the model. Where drafts are verified, results are of every
    token. Of results only those of the steps that were made mean anything.
    """

    def step(
        weights: list[jax.Array],
        adapters: Adapters,
        cache: PagedCache,
        state: SamplerState,
        words: Int[Array, "1 W"],
    ) -> tuple[PagedCache, SamplerState, Array, Array]:
        model: Decoder = jax.tree.unflatten(structure, weights)
        inputs = layout.unpack(words[0])
        if layout.bucket.max_steps == 1:
            cache, state, sampled, scores = once(model, adapters, cache, state, inputs)
            return cache, state, sampled[None, None], scores[None]

        def body(
            index: Int[Array, ""], carry: tuple[PagedCache, SamplerState, Array]
        ) -> tuple[PagedCache, SamplerState, Array]:
            cache, state, results = carry
            own = inputs.later(index)
            cache, state, sampled, _ = once(model, adapters, cache, state, own)
            return cache, state, results.at[index].set(sampled)

        shape = (layout.bucket.max_steps, layout.bucket.num_rows, RESULT_WIDTH)
        carry = (cache, state, jnp.zeros(shape, jnp.int32))
        cache, state, results = jax.lax.fori_loop(0, inputs.num_steps, body, carry)
        return cache, state, results[None], jnp.zeros((1, 0, RESULT_WIDTH), jnp.int32)

    def once(
        model: Decoder,
        adapters: Adapters,
        cache: PagedCache,
        state: SamplerState,
        inputs: StepInputs,
    ) -> tuple[PagedCache, SamplerState, Array, Array]:
        ragged, rows = inputs.ragged, inputs.rows
        first = jnp.where(
            inputs.takes_previous, ragged.query_starts[:-1], inputs.token_ids.shape[0]
        )
        fed = state.last_token[rows.slot]
        token_ids = inputs.token_ids.at[first].set(fed, mode="drop")
        state = count_fed(state, rows.slot, fed, inputs.takes_previous)

        own = batch_adapters(adapters, inputs.adapter_slots, ragged, token_ids.shape[0])
        last = jnp.maximum(ragged.query_starts[1:] - 1, 0)
        wanted = None
        if layout.bucket.has_prefill:
            # Of a prompt that is not scored the last token alone.
            wanted = jnp.zeros(token_ids.shape, jnp.bool_).at[last].set(True) | inputs.wants_scores
        hidden, cache = forward(model, cache, token_ids, ragged, own, wanted)
        if num_drafts := layout.bucket.num_drafts:
            drafts = drafts_of(token_ids, ragged, num_drafts)
            tokens, is_live = each_token(inputs, drafts, token_ids)
            logits = unembed(model, hidden, ragged.query_starts[-1])
            _, sampled = sample(logits, tokens, state, is_live, model.target)
            state = accept(inputs, drafts, state, sampled.token_ids)
        else:
            rows = replace(rows, last_token=token_ids[last])
            logits = unembed(model, hidden[last], ragged.num_requests)
            state, sampled = sample(logits, rows, state, inputs.samples, model.target)
        scores = jnp.zeros((0, RESULT_WIDTH), jnp.int32)
        if layout.bucket.has_prefill:
            scores = jax.lax.cond(
                inputs.wants_scores,
                lambda: _score(model, hidden, inputs.targets),
                lambda: jnp.zeros((hidden.shape[0], RESULT_WIDTH), jnp.int32),
            )
        return cache, state, _pack(sampled), scores

    return step


def _score(
    model: Decoder, hidden: Float[Array, "T D"], targets: Int[Array, "T"]
) -> Int[Array, "T R"]:
    """Scores every token's successor, SCORED_AT_ONCE at a time."""
    num_tokens, width = hidden.shape
    chunk = min(SCORED_AT_ONCE, num_tokens)
    surplus = -num_tokens % chunk
    hidden = jnp.pad(hidden, ((0, surplus), (0, 0))).reshape(-1, chunk, width)
    targets = jnp.pad(targets, (0, surplus)).reshape(-1, chunk)

    def score(part: tuple[Array, Array]) -> Array:
        logprob, top_ids, top_logprobs = score_tokens(unembed(model, part[0]), part[1])
        status = jnp.zeros_like(part[1])
        sampled = Sampled(
            token_ids=part[1],
            status=status,
            logprob=logprob,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
        )
        return _pack(sampled)

    return jax.lax.map(score, (hidden, targets)).reshape(-1, RESULT_WIDTH)[:num_tokens]


def _pack(sampled: Sampled) -> Int[Array, "B R"]:
    def bits(x: Array) -> Array:
        return jax.lax.bitcast_convert_type(x, jnp.int32)

    return jnp.concatenate(
        (
            sampled.token_ids[:, None],
            sampled.status[:, None],
            bits(sampled.logprob)[:, None],
            sampled.top_ids,
            bits(sampled.top_logprobs),
        ),
        axis=1,
    )
