"""The one internal request type, its sampling parameters, and what comes back for it.

Token ids only: text, stop strings and chat templates live in the server. Every protocol builds a
`Request` and every limit on one is checked in `engine/validation.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from pallasite.engine.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. The defaults sample from the model's own distribution.

    Attributes:
        max_tokens: completion tokens at most, >= 1; prompt and completion must fit the context.
        min_tokens: no stop id and no end-of-sequence id is sampled before this many tokens.
        n: independent completions of the same prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all. Ties with the k-th are kept.
        top_p: keep the smallest set of most likely tokens whose mass reaches this, in (0, 1].
        min_p: keep tokens at least this times as likely as the likeliest, in [0, 1].
        repetition_penalty: 0.01 to 100; divides positive and multiplies negative logits of tokens
            that stand in the prompt or the completion (Keskar et al. 2019).
        presence_penalty: subtracted once from the logit of each token in the completion.
        frequency_penalty: subtracted per occurrence in the completion.
        logit_bias: token id to a value added to its logit.
        allowed_token_ids: only these may be sampled; None allows all.
        bad_words: token sequences that may not be completed.
        seed: the same seed, prompt and parameters give the same tokens whatever else is in the
            batch; None draws one.
        logprobs: report the sampled token's log-probability and this many of the likeliest
            (0 to 20); None reports none. Of the model's own distribution, before any of the above.
        prompt_logprobs: the same for each prompt token given those before it.
        stop_token_ids: ids that end the completion, beside the model's end-of-sequence ids.
        include_stop: whether the id that stopped is part of the completion.
        ignore_eos: whether the model's end-of-sequence ids do not stop.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be completed `params.n` times.

    Attributes:
        prompt_ids: the prompt's token ids, at least one.
        params: how tokens are chosen and when to end.
        request_id: names it for `Engine.abort`; the engine draws one where it is empty.
        priority: lower is served first; equal ones by arrival.
        timeout_s: seconds from submission after which it ends with DEADLINE_EXCEEDED; None never.
        tenant: who asks; a KV handle is bound to its tenant.
        adapter: the name of a loaded adapter; empty for none.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""
    priority: int = 0
    timeout_s: float | None = None
    tenant: str = ""
    adapter: str = ""


class FinishReason(StrEnum):
    """Why a completion ended; each ends once."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """A token's log-probability, and the likeliest tokens at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts. `cached_tokens` of the prompt were not computed for this completion.

    Speculation drafted `draft_tokens` for it, `accepted_tokens` of which were right.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds spent waiting for the first step, until the first token, and after it."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How one completion ended.

    Attributes:
        matched: the stop id, or the stop string that the server matched; None for other reasons.
        error: for ERROR, what happened.
    """

    reason: FinishReason
    usage: Usage
    timing: Timing
    matched: int | str | None = None
    error: RequestError | None = None


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """What one step, or several where the reader lags, added to one completion.

    Attributes:
        index: which of the n completions.
        token_ids: new tokens, possibly none in the last event.
        logprobs: one entry a token where the request asked for them, else empty.
        prompt_logprobs: in the completion's first event where asked for: one entry a prompt
            token, None for the first; else None.
        finish: set in the completion's last event.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish: Finish | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole completion, as the offline `Engine.generate` returns it."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    finish: Finish


@dataclass(frozen=True, kw_only=True)
class KvHandle:
    """A lease on the computed pages of a prompt and its first token.

    Attributes:
        handle_id: 128 random bits as 32 hexadecimal digits.
        epoch: the engine's own random name; a handle of another epoch is refused.
        expires_in_s: seconds until the lease ends.
    """

    handle_id: str
    epoch: str
    expires_in_s: float
