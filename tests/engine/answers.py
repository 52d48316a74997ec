"""What an engine on the shared model may answer, by definition, and when two answers agree.

Sums in another order, as another batch or chunk takes them, move a logit in its last bits. Where
two tokens are that close no order is wrong, and the answers may part there; nowhere else.
"""

from collections.abc import Sequence

import numpy as np

from pallasite.engine import Completion, Request, SamplingParams
from tests.engine.harness import ORACLE
from tests.engine.llama_oracle import LlamaOracle
from tests.engine.sampler_oracle import exponential_noise, possible_tokens, processed
from tests.tiny_checkpoints import TINY

ROUNDING = 1e-4
"""How far the engine's f32 may be from float64 after the whole model: a logit absolutely, the
chances of a draw relatively."""


def possible_next(
    prompt: Sequence[int],
    params: SamplingParams,
    index: int,
    output: Sequence[int],
    logits: np.ndarray,
) -> set[int]:
    """Returns what completion `index` may have after `output`, whose logits f64[V] are given."""
    x = processed(logits, params, prompt, output, banned(params, prompt, output))
    noise = np.ones(len(x))
    if params.temperature > 0:
        noise = exponential_noise(seed_of(params, index), len(output), len(x))
    return possible_tokens(x, params, noise, ROUNDING)


def assert_same_answers(
    requests: Sequence[Request],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
) -> int:
    """Each completion's tokens, in order, n a request, are the same, but for a tie in a few.

    Returns in how many. They are whole answers, or begin as such.
    """
    completions = [(r, index) for r in requests for index in range(r.params.n)]
    num_ties = 0
    for (request, index), one, other in zip(completions, ours, theirs, strict=True):
        if tuple(one) != tuple(other):
            num_ties += 1
            if request.params.ignore_eos:
                assert len(one) == len(other)
            assert_allowed(request, one, index)
            assert_allowed(request, other, index)
    assert num_ties <= 1 + len(completions) // 50
    return num_ties


def assert_allowed(request: Request, ids: Sequence[int], index: int = 0) -> None:
    """Every token of an answer is one that its definition allows after those before it."""
    prompt, params = request.prompt_ids, request.params
    logits = ORACLE.logits((*prompt, *ids))[len(prompt) - 1 :]
    for place, token_id in enumerate(ids):
        possible = possible_next(prompt, params, index, ids[:place], logits[place])
        assert token_id in possible, (request, index, place, token_id, possible)


def logprob_errors(
    requests: Sequence[Request], completions: Sequence[Completion], oracle: LlamaOracle = ORACLE
) -> np.ndarray:
    """How far each token's log-probability is from the oracle's, given all tokens before it.

    Requests have one completion each, and ask for logprobs of their prompts, too.
    """
    errors = []
    for request, completion in zip(requests, completions, strict=True):
        ids = (*request.prompt_ids, *completion.token_ids)
        entries = [*completion.prompt_logprobs[1:], *completion.logprobs]
        assert [entry.token_id for entry in entries] == list(ids[1:])
        logits = oracle.logits(ids[:-1])
        logits -= logits.max(axis=1, keepdims=True)
        right = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        ours = np.array([entry.logprob for entry in entries])
        errors.append(ours - right[np.arange(len(entries)), list(ids[1:])])
    found = np.abs(np.concatenate(errors))
    assert np.isfinite(found).all()
    return found


def banned(params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
    """The ids that min_tokens and bad_words forbid after this output."""
    ids = [*TINY.eos_token_ids, *params.stop_token_ids] if len(output) < params.min_tokens else []
    history = (*prompt, *output)
    for *prefix, last in params.bad_words:
        if not prefix or history[-len(prefix) :] == tuple(prefix):
            ids.append(last)
    return ids


def seed_of(params: SamplingParams, index: int) -> int:
    """A completion's 32 bits, as `engine/sequence.py` defines them."""
    assert params.seed is not None
    mixed = params.seed + index * 0x9E3779B97F4A7C15
    return (mixed ^ (mixed >> 32)) & 0xFFFFFFFF
