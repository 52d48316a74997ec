"""Sampling as its definitions read: float64, sorted, one row at a time. Shares no code with it."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pallasite.engine.request import SamplingParams

EDGE = 1e-6
"""How near to a cut, relatively, f32 may put a token on the other side of it."""


def processed(
    logits: np.ndarray,
    params: SamplingParams,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    banned: Sequence[int] = (),
) -> np.ndarray:
    """Returns f64[V]: the logits after bias, bans and penalties."""
    x = logits.astype(np.float64)
    for token_id, bias in params.logit_bias.items():
        x[token_id] += np.float32(bias)
    if params.allowed_token_ids is not None:
        x[sorted(set(range(len(x))) - set(params.allowed_token_ids))] = -np.inf
    x[list(banned)] = -np.inf
    repetition = float(np.float32(params.repetition_penalty))
    for token_id in {*prompt_ids, *output_ids}:
        x[token_id] = x[token_id] / repetition if x[token_id] > 0 else x[token_id] * repetition
    for token_id, count in Counter(output_ids).items():
        x[token_id] -= float(np.float32(params.frequency_penalty)) * count
        x[token_id] -= float(np.float32(params.presence_penalty))
    return x


def kept(x: np.ndarray, params: SamplingParams, slack: float = 0.0) -> np.ndarray:
    """Returns bool[V]: what min_p, top_k and top_p leave of processed logits.

    A slack moves the cuts of min_p and top_p by this share, outwards where it is positive, and that
    of top_k outwards by this much.
    """
    ratio = np.exp((x - x.max()) / float(np.float32(params.temperature)))
    keep = np.isfinite(x) & (ratio >= min(1.0, float(np.float32(params.min_p)) * (1 - slack)))
    if 0 < params.top_k < len(x):
        keep &= x >= np.sort(x)[-params.top_k] - max(slack, 0.0)
    if params.top_p < 1.0:
        order = np.argsort(-np.where(keep, x, -np.inf), kind="stable")
        mass = np.cumsum(np.where(keep, ratio, 0.0)[order])
        reached = mass >= float(np.float32(params.top_p)) * (1 + slack) * mass[-1]
        last = int(np.argmax(reached)) if reached.any() else len(x) - 1
        keep &= x >= x[order[last]]
    return keep


def probabilities(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Returns f64[V]: the distribution that is drawn from."""
    weights = np.where(
        kept(x, params), np.exp((x - x.max()) / float(np.float32(params.temperature))), 0.0
    )
    return weights / weights.sum()


def possible_tokens(
    x: np.ndarray, params: SamplingParams, noise: np.ndarray, edge: float = EDGE
) -> set[int]:
    """Returns the tokens that a draw with this exponential noise may give: one, but at an edge."""
    if params.temperature == 0.0:
        return {int(token_id) for token_id in np.flatnonzero(x >= x.max() - edge)}
    ratio = np.exp((x - x.max()) / float(np.float32(params.temperature)))
    tokens = set()
    for slack in (-edge, 0.0, edge):
        race = np.where(kept(x, params, slack), ratio / noise, 0.0)
        tokens |= {int(token_id) for token_id in np.flatnonzero(race >= race.max() * (1 - edge))}
    return tokens


def exponential_noise(seed: int, output_index: int, vocab_size: int) -> np.ndarray:
    """Returns f64[V]: the noise of one draw."""
    uniform = random_words(seed, output_index, vocab_size) * 2.0**-32 + 2.0**-33
    return -np.log1p(-np.minimum(uniform, 1 - 2.0**-24))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def random_words(seed: int, output_index: int, num_words: int) -> np.ndarray:
    """Returns i64[num_words]: Threefry-2x32-20's first words, in integers that cannot overflow."""
    mask = 0xFFFFFFFF
    keys = (seed & mask, output_index & mask)
    keys = (*keys, keys[0] ^ keys[1] ^ 0x1BD11BDA)
    a = (np.arange(num_words, dtype=np.int64) + keys[0]) & mask
    b = np.full_like(a, keys[1])
    for i in range(20):
        r = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        a = (a + b) & mask
        b = ((b << r | b >> (32 - r)) & mask) ^ a
        if i % 4 == 3:
            j = i // 4 + 1
            a = (a + keys[j % 3]) & mask
            b = (b + keys[(j + 1) % 3] + j) & mask
    return a
