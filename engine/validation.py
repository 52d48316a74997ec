"""The one place where a request is checked: every protocol and every caller is held to this.

Checks run before admission and before any loop over what the request contains.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

from pallasite.engine.adapters import MAX_NAME_LEN as MAX_ADAPTER_NAME_LEN
from pallasite.engine.config import Limits
from pallasite.engine.errors import RequestError
from pallasite.engine.request import Request, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What the engine at hand can serve.

    Attributes:
        vocab_size: ids lie in [0, vocab_size).
        max_context_len: prompt and completion tokens at most.
        num_cached_tokens: what the pages of one shard hold: the most of one request.
        limits: what the operator allows.
    """

    vocab_size: int
    max_context_len: int
    num_cached_tokens: int
    limits: Limits


def validate(request: Request, bounds: Bounds) -> None:
    """Raises RequestError (INVALID_ARGUMENT, with the field's name) for a request not valid."""
    limits = bounds.limits
    check_request_id(request.request_id, limits)
    _length("tenant", request.tenant, 0, limits.max_tenant_len)
    _length("adapter", request.adapter, 0, MAX_ADAPTER_NAME_LEN)
    _int("priority", request.priority, -(2**31), 2**31 - 1)
    if request.timeout_s is not None:
        _float("timeout_s", request.timeout_s, least=0.0, excluded=True)
    prompt_len = len(request.prompt_ids)
    if prompt_len == 0:
        _refuse("prompt", "an empty prompt", "at least one token", "send some text or token ids")
    if prompt_len >= bounds.max_context_len:
        _refuse(
            "prompt",
            f"a prompt of {prompt_len} tokens",
            f"at most {bounds.max_context_len - 1}, which leaves room for one more",
            "shorten the prompt",
        )
    _ids("prompt", request.prompt_ids, bounds.vocab_size)
    _check_params(request.params, bounds)
    total = prompt_len + request.params.max_tokens
    if total > bounds.max_context_len:
        _refuse(
            "sampling.max_tokens",
            f"{prompt_len} prompt tokens and max_tokens={request.params.max_tokens}",
            f"{bounds.max_context_len} in all",
            "lower max_tokens or shorten the prompt",
        )
    if total > bounds.num_cached_tokens:
        _refuse(
            "sampling.max_tokens",
            f"{prompt_len} prompt tokens and max_tokens={request.params.max_tokens}",
            f"the {bounds.num_cached_tokens} that the cache holds for one request",
            "lower max_tokens, or start the server with a larger cache",
        )


def validate_prefill(request: Request, bounds: Bounds) -> None:
    """Raises RequestError as `validate` does, and where one lease would be of many completions."""
    validate(request, bounds)
    if request.params.n != 1:
        got = f"{request.params.n} for a prefill"
        _refuse("sampling.n", got, "1", "prefill once for each completion")


def check_request_id(request_id: object, limits: Limits) -> None:
    """Raises RequestError where a request's id is too long or not printable."""
    _length("request_id", request_id, 0, limits.max_request_id_len)


def _check_params(params: SamplingParams, bounds: Bounds) -> None:
    limits, vocab_size = bounds.limits, bounds.vocab_size
    _int("sampling.max_tokens", params.max_tokens, 1, 2**31 - 1)
    _int("sampling.min_tokens", params.min_tokens, 0, params.max_tokens)
    _int("sampling.n", params.n, 1, limits.max_n)
    _float("sampling.temperature", params.temperature, least=0.0, most=100.0)
    _int("sampling.top_k", params.top_k, 0, vocab_size)
    _float("sampling.top_p", params.top_p, least=0.0, most=1.0, excluded=True)
    _float("sampling.min_p", params.min_p, least=0.0, most=1.0)
    # Logits are multiplied by it and divided by it: neither may leave f32.
    _float("sampling.repetition_penalty", params.repetition_penalty, least=0.01, most=100.0)
    _float("sampling.presence_penalty", params.presence_penalty, least=-100.0, most=100.0)
    _float("sampling.frequency_penalty", params.frequency_penalty, least=-100.0, most=100.0)
    if params.seed is not None:
        _int("sampling.seed", params.seed, -(2**63), 2**64 - 1)
    for name in ("logprobs", "prompt_logprobs"):
        if (value := getattr(params, name)) is not None:
            _int(f"sampling.{name}", value, 0, limits.max_logprobs)

    _count("sampling.logit_bias", params.logit_bias, limits.max_logit_bias)
    _ids("sampling.logit_bias", params.logit_bias, vocab_size)
    for value in params.logit_bias.values():
        _float("sampling.logit_bias", value, least=-1000.0, most=1000.0)
    if params.allowed_token_ids is not None:
        if not params.allowed_token_ids:
            _refuse("sampling.allowed_token_ids", "an empty list", "one id or more", "leave it out")
        _count("sampling.allowed_token_ids", params.allowed_token_ids, vocab_size)
        _ids("sampling.allowed_token_ids", params.allowed_token_ids, vocab_size)
    _count("sampling.stop_token_ids", params.stop_token_ids, limits.max_stop_token_ids)
    _ids("sampling.stop_token_ids", params.stop_token_ids, vocab_size)
    _count("sampling.bad_words", params.bad_words, limits.max_bad_words)
    for word in params.bad_words:
        if not word:
            _refuse("sampling.bad_words", "an empty word", "one token or more", "leave it out")
        _count("sampling.bad_words", word, limits.max_bad_word_len)
        _ids("sampling.bad_words", word, vocab_size)
    _check_contradictions(params)


def _check_contradictions(params: SamplingParams) -> None:
    if params.allowed_token_ids is not None:
        banned = {word[0] for word in params.bad_words if len(word) == 1}
        if banned.issuperset(params.allowed_token_ids):
            _refuse(
                "sampling.bad_words",
                "bad_words that forbid every one of allowed_token_ids",
                "at least one token that may be sampled",
                "allow one more, or forbid one less",
            )


def _refuse(field: str, got: str, allowed: str, change: str) -> None:
    raise RequestError(f"{field}: got {got}; allowed is {allowed}; {change}", field=field)


# The values below are the caller's, so their types are looked at rather than believed.


def _int(field: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        _refuse(field, _shown(value), f"an integer from {least} to {most}", "change it")


def _float(
    field: str,
    value: object,
    *,
    least: float,
    most: float = math.inf,
    excluded: bool = False,
) -> None:
    number = _number(value)
    if math.isfinite(number) and least <= number <= most and not (excluded and number == least):
        return
    above = f"above {least:g}" if excluded else f"from {least:g}"
    upto = "" if most == math.inf else f" up to {most:g}"
    _refuse(field, _shown(value), f"a finite number {above}{upto}", "change it")


def _number(value: object) -> float:
    """Returns a number as a float, and NaN for anything that is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer beyond the floats
        return math.nan


def _shown(value: object) -> str:
    """Returns what was got, kept short; Python refuses to print vast integers."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:80]


def _length(field: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, str) or not least <= len(value) <= most or not value.isprintable():
        _refuse(
            field,
            _shown(value),
            f"at most {most} printable characters",
            "shorten it or leave it out",
        )


def _count(field: str, values: Collection[object], most: int) -> None:
    if len(values) > most:
        _refuse(field, f"{len(values)} entries", f"at most {most}", "send fewer")


def _ids(field: str, ids: Collection[object], vocab_size: int) -> None:
    if any(type(token_id) is not int for token_id in ids):
        odd = next(token_id for token_id in ids if type(token_id) is not int)
        _refuse(field, f"the token id {_shown(odd)}", "integers", "send token ids")
    whole = cast(Collection[int], ids)
    # min and max are quick on what may be a hundred thousand ids.
    if whole and (min(whole) < 0 or max(whole) >= vocab_size):
        odd = min(whole) if min(whole) < 0 else max(whole)
        allowed = f"ids from 0 to {vocab_size - 1}"
        _refuse(field, f"the token id {_shown(odd)}", allowed, "send such ids")
