"""From logits to token ids, inside the step's program.

Every choice is data, one row a request, so one program serves any mix of requests; a stage that no
row asks for is skipped at run time. Knows no pages, no text and no request objects.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float32, Int32, UInt32

from pallasite.engine.sampler_state import SamplerState
from pallasite.pallas_kernels.peaks import find_peaks
from pallasite.pallas_kernels.target import CPU, Target

NUM_TOP = 20
"""How many of the likeliest tokens are reported beside a token's log-probability."""

OK, NOT_FINITE, NONE_ALLOWED = 0, 1, 2
"""`Sampled.status`: a token was sampled; the logits had a NaN or +inf; no token was allowed."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingRows:
    """How each of the B rows of a batch is sampled.

    The fields are typed Any since the same tree also holds abstract shapes, shardings and donation
    flags while a program is lowered. Their meaning is that of `SamplingParams`, and:

    Attributes:
        temperature: f32[B], 0 for greedy.
        top_k: i32[B], 0 for all.
        top_p: f32[B].
        min_p: f32[B].
        repetition_penalty: f32[B].
        presence_penalty: f32[B].
        frequency_penalty: f32[B].
        seed: i32[B], the bits of 32-bit seeds.
        output_index: i32[B], how many tokens of the completion were sampled before.
        slot: i32[B], the row's place in `SamplerState`.
        has_bias: bool[B], whether the slot's bias applies.
        num_logprobs: i32[B], -1 where none are wanted.
        bans: i32[B, W, 2], pairs (if_token, banned): `banned` may not be sampled where if_token is
            -1 or equals last_token; banned is -1 in an unused pair.
        last_token: i32[B], the token fed last.
        drafts: i32[B, K], tokens that stand in the completion before the one to be sampled and that
            the slot's counts lack, -1 for none.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    seed: Any
    output_index: Any
    slot: Any
    has_bias: Any
    num_logprobs: Any
    bans: Any
    last_token: Any
    drafts: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What one step sampled. Rows that are not live hold nothing of meaning but their status, OK.

    The log-probabilities are of the model's own distribution, before any processing, and mean
    something only in rows with num_logprobs >= 0.

    Attributes:
        token_ids: i32[B]; 0 where the status is not OK.
        status: i32[B], one of OK, NOT_FINITE, NONE_ALLOWED.
        logprob: f32[B], of the sampled token.
        top_ids: i32[B, 20], the likeliest tokens, best first; -1 beyond a smaller vocabulary.
        top_logprobs: f32[B, 20]; -inf beyond a smaller vocabulary.
    """

    token_ids: Any
    status: Any
    logprob: Any
    top_ids: Any
    top_logprobs: Any


def sample(
    logits: Float32[Array, "B V"],
    rows: SamplingRows,
    state: SamplerState,
    is_live: Bool[Array, "B"],
    target: Target = CPU,
) -> tuple[SamplerState, Sampled]:
    """Samples one token a row: bias, bans, penalties, temperature, min_p, top_k, top_p, draw.

    The draw depends on a row's seed and output_index and on nothing else of the batch. A row whose
    logits cannot be sampled says so in its status and leaves the others alone.

    Returns:
        The state with the last_token of the live rows' slots replaced, and what was sampled.
    """
    with jax.named_scope("sampler"):
        is_biased = is_live & rows.has_bias
        has_bans = is_live & jnp.any(rows.bans[:, :, 1] >= 0, axis=1)
        is_penalized = is_live & (
            (rows.repetition_penalty != 1.0)
            | (rows.presence_penalty != 0.0)
            | (rows.frequency_penalty != 0.0)
        )
        is_drawn = is_live & (rows.temperature > 0.0)

        def process_and_choose() -> tuple[Array, Array]:
            x = _if_any(is_biased, lambda x: _add_bias(x, rows, state), logits)
            x = _if_any(has_bans, lambda x: _ban(x, rows), x)
            x = _if_any(is_penalized, lambda x: _penalize(x, rows, state), x)
            processed = find_peaks(x, target)

            def draw() -> Array:
                race = _race(x, processed.largest, rows, is_drawn)
                return find_peaks(race, target).first

            chosen = lax.cond(jnp.any(is_drawn), draw, lambda: processed.first)
            return chosen, processed.largest

        raw = find_peaks(logits, target)
        # One branch around all stages, whose results are small: an untouched array that leaves a
        # branch would be copied, and a greedy batch would pay for that.
        token_ids, best = lax.cond(
            jnp.any(is_biased | has_bans | is_penalized | is_drawn),
            process_and_choose,
            lambda: (raw.first, raw.largest),
        )
        # Of the raw logits, since a ban may hide a NaN. A penalty may overflow them to +inf.
        is_finite = raw.is_finite & (best < jnp.inf)
        status = jnp.where(is_finite, jnp.where(best > -jnp.inf, OK, NONE_ALLOWED), NOT_FINITE)
        status = jnp.where(is_live, status, OK).astype(jnp.int32)
        token_ids = jnp.where(status == OK, token_ids, 0)

        logprob, top_ids, top_logprobs = lax.cond(
            jnp.any(is_live & (rows.num_logprobs >= 0)),
            lambda: score_tokens(logits, token_ids),
            lambda: _no_scores(logits.shape[0]),
        )
    slots = jnp.where(is_live, rows.slot, state.last_token.shape[0])
    last_token = state.last_token.at[slots].set(token_ids, mode="drop")
    sampled = Sampled(
        token_ids=token_ids,
        status=status,
        logprob=logprob,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )
    return replace(state, last_token=last_token), sampled


def score_tokens(
    logits: Float32[Array, "C V"], targets: Int32[Array, "C"]
) -> tuple[Float32[Array, "C"], Int32[Array, "C 20"], Float32[Array, "C 20"]]:
    """Returns each target's log-probability, and the 20 likeliest ids with theirs, best first.

    Beyond a vocabulary smaller than 20 the ids are -1 and their log-probabilities -inf.
    """
    peak = jnp.max(logits, axis=1, keepdims=True)
    log_total = peak[:, 0] + jnp.log(jnp.sum(jnp.exp(logits - peak), axis=1))
    logprob = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0] - log_total
    top_logits, top_ids = lax.top_k(logits, min(NUM_TOP, logits.shape[1]))
    missing = ((0, 0), (0, NUM_TOP - top_ids.shape[1]))
    top_logprobs = jnp.pad(top_logits - log_total[:, None], missing, constant_values=-jnp.inf)
    return logprob, jnp.pad(top_ids, missing, constant_values=-1), top_logprobs


def kept_weights(
    x: Float32[Array, "B V"],
    best: Float32[Array, "B"],
    rows: SamplingRows,
    is_drawn: Bool[Array, "B"],
) -> Float32[Array, "B V"]:
    """Returns each token's probability relative to the likeliest one's; 0 where it is not kept.

    Also 0 below 1e-38, which no draw could reach: the noise spans 11 orders of magnitude.

    Args:
        x: processed logits.
        best: the greatest of each row.
        is_drawn: rows whose temperature is above 0; the others' result means nothing.
    """
    temperature = jnp.where(is_drawn, rows.temperature, 1.0)
    # The likeliest is subtracted first, so that a small temperature cannot overflow.
    weights = jnp.exp((x - best[:, None]) / temperature[:, None])
    weights = jnp.where(weights >= rows.min_p[:, None], weights, 0.0)
    has_top_k = is_drawn & (rows.top_k > 0)
    has_top_p = is_drawn & (rows.top_p < 1.0)

    def keep_top_k(weights: Array) -> Array:
        # Of the logits themselves: dividing by the temperature may make two of them equal.
        wanted = jnp.where(has_top_k, rows.top_k.astype(jnp.float32), jnp.inf)
        least = _threshold(x, jnp.ones_like, wanted)
        return jnp.where(x >= least[:, None], weights, 0.0)

    def keep_top_p(weights: Array) -> Array:
        wanted = jnp.where(has_top_p, rows.top_p * jnp.sum(weights, axis=1), jnp.inf)
        least = _threshold(weights, lambda weights: weights, wanted)
        return jnp.where(weights >= least[:, None], weights, 0.0)

    weights = _if_any(has_top_k, keep_top_k, weights)
    return _if_any(has_top_p, keep_top_p, weights)


def _no_scores(num_rows: int) -> tuple[Array, Array, Array]:
    return (
        jnp.zeros((num_rows,), jnp.float32),
        jnp.full((num_rows, NUM_TOP), -1, jnp.int32),
        jnp.full((num_rows, NUM_TOP), -jnp.inf, jnp.float32),
    )


def _if_any(asks: Array, stage: Callable[[Array], Array], x: Array) -> Array:
    return lax.cond(jnp.any(asks), stage, lambda x: x, x)


def _add_bias(x: Array, rows: SamplingRows, state: SamplerState) -> Array:
    return jnp.where(rows.has_bias[:, None], x + _slot_rows(state.bias, rows), x)


def _ban(x: Array, rows: SamplingRows) -> Array:
    if_token, banned = rows.bans[:, :, 0], rows.bans[:, :, 1]
    applies = (banned >= 0) & ((if_token == -1) | (if_token == rows.last_token[:, None]))
    row_index = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return x.at[row_index, jnp.where(applies, banned, x.shape[1])].set(-jnp.inf, mode="drop")


def _penalize(x: Array, rows: SamplingRows, state: SamplerState) -> Array:
    counts = _slot_rows(state.counts, rows)
    if rows.drafts.shape[1]:
        row_index = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
        drafts = jnp.where(rows.drafts >= 0, rows.drafts, x.shape[1])
        counts = counts.at[row_index, drafts].add(1, mode="drop")
    repetition = rows.repetition_penalty[:, None]
    repeats = (counts > 0) | _slot_rows(state.is_seen, rows)
    x = jnp.where(repeats, jnp.where(x > 0.0, x / repetition, x * repetition), x)
    x = x - rows.frequency_penalty[:, None] * counts.astype(jnp.float32)
    return x - jnp.where(counts > 0, rows.presence_penalty[:, None], 0.0)


def _slot_rows(per_slot: Array, rows: SamplingRows) -> Array:
    """Returns each row's slot of an [S, V] array; rows that are not live may get any."""
    return per_slot.at[rows.slot].get(mode="clip")


def _race(x: Array, best: Array, rows: SamplingRows, is_drawn: Array) -> Array:
    """Returns values whose largest is at a draw where is_drawn, and the logits elsewhere.

    Gumbel-max as an exponential race (Efraimidis and Spirakis 2006): the token with the largest
    weight / e wins, e being independent exponential noise; its logarithm is logit + Gumbel noise,
    and it needs one logarithm fewer.
    """
    weights = kept_weights(x, best, rows, is_drawn)
    return jnp.where(is_drawn[:, None], weights / _exponential_noise(rows, x.shape[1]), x)


_Search = tuple[Array, Array, Array, Array]


def _threshold(
    values: Float32[Array, "B V"],
    weigh: Callable[[Array], Array],
    wanted: Float32[Array, "B"],
) -> Float32[Array, "B"]:
    """Returns the largest t such that the values >= t weigh at least `wanted` together.

    Where all of a row's values do not weigh that much, the least of them. `weigh` gives each
    value's weight >= 0 and must not fall as the value grows. Bisects the order-preserving integers
    of f32, so that t is exact after at most 32 passes over the values; sorting costs 20 times as
    much on a CPU. A row stops as soon as its set is known, by rules that look at that row alone.
    """

    def middle(low: Array, high: Array) -> Array:
        return (low >> 1) + (high >> 1) + (low & high & 1)

    def is_open(search: _Search) -> Array:
        low, high, weight_at_low, weight_at_high = search
        # Two values in [low, high) would weigh twice as much as `low`; 1.5 allows for rounding.
        one_left = weight_at_low - weight_at_high < 1.5 * weigh(_float(low))
        return (middle(low, high) != low) & (weight_at_low > wanted) & ~one_left

    def halve(search: _Search) -> _Search:
        low, high, weight_at_low, weight_at_high = search
        mid = middle(low, high)
        is_kept = values >= _float(mid)[:, None]
        weight = jnp.sum(jnp.where(is_kept, weigh(values), 0.0), axis=1)
        raises = is_open(search) & (weight >= wanted)
        lowers = is_open(search) & ~(weight >= wanted)
        return (
            jnp.where(raises, mid, low),
            jnp.where(lowers, mid, high),
            jnp.where(raises, weight, weight_at_low),
            jnp.where(lowers, weight, weight_at_high),
        )

    low = _image(jnp.min(values, axis=1))
    high = _image(jnp.max(values, axis=1)) + 1
    search = (low, high, jnp.sum(weigh(values), axis=1), jnp.zeros_like(wanted))
    return _float(lax.while_loop(lambda search: jnp.any(is_open(search)), halve, search)[0])


def _image(values: Array) -> Array:
    """Returns i32 that are ordered as the f32 are; its own inverse on the bits."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float(image: Array) -> Array:
    return lax.bitcast_convert_type(image ^ ((image >> 31) & 0x7FFFFFFF), jnp.float32)


def _exponential_noise(rows: SamplingRows, vocab_size: int) -> Float32[Array, "B V"]:
    """Returns noise of the unit exponential distribution, in [2**-33, 17]."""
    bits = _random_bits(
        lax.bitcast_convert_type(rows.seed, jnp.uint32),
        lax.bitcast_convert_type(rows.output_index, jnp.uint32),
        vocab_size,
    )
    # All 32 bits count: the least noise decides, and 24 bits would tie in a large vocabulary.
    uniform = bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33
    return -jnp.log1p(-jnp.minimum(uniform, 1.0 - 2.0**-24))


def _random_bits(
    seed: UInt32[Array, "B"], index: UInt32[Array, "B"], width: int
) -> UInt32[Array, "B width"]:
    """Returns the first words of Threefry-2x32-20 (Salmon et al. 2011) keyed by (seed, index).

    Unrolled and one word a counter: jax.random's own is rolled on a CPU and takes 4 times as long.
    """
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    key, tweak = seed[:, None], index[:, None]
    keys = (key, tweak, key ^ tweak ^ np.uint32(0x1BD11BDA))
    left = jnp.arange(width, dtype=jnp.uint32)[None, :] + keys[0]
    right = jnp.broadcast_to(keys[1], left.shape)
    for group in range(5):
        for distance in rotations[group % 2]:
            left = left + right
            right = left ^ ((right << distance) | (right >> (32 - distance)))
        left = left + keys[(group + 1) % 3]
        right = right + keys[(group + 2) % 3] + np.uint32(group + 1)
    return left
