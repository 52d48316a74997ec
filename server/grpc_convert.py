"""Between the messages of inference.proto and the server's own types. Only shapes; no limits."""

from collections.abc import Iterator, Sequence
from typing import Any

from pallasite.engine.errors import RequestError
from pallasite.engine.request import (
    Finish,
    FinishReason,
    KvHandle,
    SamplingParams,
    Timing,
    TokenLogprobs,
    Usage,
)
from pallasite.proto import inference_pb2 as pb
from pallasite.server.grpc_door import Call
from pallasite.server.text_request import Prompt, Scores, TextEvent, TextRequest

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
# Where the gRPC messages have other names for what errors speak of.
_FIELD_NAMES = {
    "request_id": "x-request-id",
    "messages": "chat.messages",
    "handle": "handle_id",
    "handle.epoch": "epoch",
}
# Sampling fields that the engine knows by the same name and type.
PLAIN_PARAMS = (
    "max_tokens",
    "min_tokens",
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
    "prompt_logprobs",
    "include_stop",
    "ignore_eos",
)


def text_request(request: pb.GenerateRequest, call: Call) -> TextRequest:
    """A GenerateRequest as every protocol's request. Raises RequestError where no prompt is set or
    two fields contradict each other."""
    sampling = request.sampling
    return TextRequest(
        prompt=prompt(request),
        params=_params(sampling),
        stop=tuple(sampling.stop),
        bad_words=tuple(sampling.bad_words),
        skips_special=_given(sampling, "skip_special_tokens", True),
        model=request.model,
        request_id=call.request_id,
        priority=request.priority,
        timeout_s=call.timeout_s,
        tenant=call.tenant,
        adapter=request.adapter,
    )


def score_request(request: pb.ScoreRequest, call: Call) -> TextRequest:
    """A ScoreRequest as every protocol's request. Raises RequestError as `text_request` does."""
    return TextRequest(
        prompt=prompt(request),
        model=request.model,
        request_id=call.request_id,
        priority=request.priority,
        timeout_s=call.timeout_s,
        tenant=call.tenant,
        adapter=request.adapter,
    )


def prompt(request: pb.GenerateRequest | pb.ScoreRequest | pb.TokenizeRequest) -> Prompt:
    """The prompt that a message's `oneof prompt` holds. Raises RequestError where it holds none, or
    where add_special_tokens is set without a text."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        choices = request.DESCRIPTOR.oneofs_by_name["prompt"].fields
        raise RequestError(
            f"got no prompt; it must be one of {', '.join(field.name for field in choices)}; set"
            " one",
            field="prompt",
        )
    if kind == "text":
        adds = _given(request, "add_special_tokens", True)
        return Prompt(text=request.text, adds_special_tokens=adds)
    if request.HasField("add_special_tokens"):
        raise RequestError(
            f"got add_special_tokens with {kind}; it is allowed with text only; leave it out",
            field="add_special_tokens",
        )
    if kind == "token_ids":
        return Prompt(token_ids=tuple(request.token_ids.ids))
    messages = tuple(
        {"role": message.role, "content": message.content} for message in request.chat.messages
    )
    adds = _given(request.chat, "add_generation_prompt", True)
    return Prompt(messages=messages, adds_generation_prompt=adds)


def generate_event(event: TextEvent) -> pb.GenerateEvent:
    """A TextEvent as a message."""
    message = pb.GenerateEvent(index=event.index, text=event.text, token_ids=event.token_ids)
    if event.logprobs:
        message.logprobs.extend(_places(event.logprobs))
    if event.prompt_logprobs is not None:
        known = [place for place in event.prompt_logprobs if place is not None]
        message.prompt_logprobs.extend(_places(known))
    if event.finish is not None:
        message.finish.CopyFrom(_finish(event.finish))
    return message


def score_response(scores: Scores) -> pb.ScoreResponse:
    """A prompt's scores as a message."""
    return pb.ScoreResponse(
        token_ids=scores.token_ids,
        logprobs=[logprob for logprob in scores.logprobs if logprob is not None],
        top=[_top(top) for top in scores.top],
        usage=_usage(scores.usage),
        timing=_timing(scores.timing),
    )


def kv_handle(handle: KvHandle) -> pb.KvHandle:
    """A KvHandle as a message."""
    return pb.KvHandle(
        handle_id=handle.handle_id, epoch=handle.epoch, expires_in_s=handle.expires_in_s
    )


def field_path(field: str, request: Any, path: str) -> str:
    """The path of a field that an error names, in the call's message; `path` is the request's own
    in that message. "" where the error names none."""
    if field in ("", "lease_s", "request_id", "timeout_s", "tenant"):
        # Carried by the call itself, or by the message above the request.
        return _FIELD_NAMES.get(field, field)
    if field == "prompt":
        name = request.WhichOneof("prompt") or field
    else:
        name = _FIELD_NAMES.get(field, field)
    return f"{path}.{name}".lstrip(".")


def _params(sampling: pb.SamplingParams) -> SamplingParams:
    given: dict[str, Any] = {
        name: getattr(sampling, name) for name in PLAIN_PARAMS if sampling.HasField(name)
    }
    if sampling.logit_bias:
        given["logit_bias"] = dict(sampling.logit_bias)
    if sampling.HasField("allowed_token_ids"):
        given["allowed_token_ids"] = tuple(sampling.allowed_token_ids.ids)
    if sampling.bad_word_ids:
        given["bad_words"] = tuple(tuple(word.ids) for word in sampling.bad_word_ids)
    if sampling.stop_token_ids:
        given["stop_token_ids"] = tuple(sampling.stop_token_ids)
    return SamplingParams(**given)


def _given(message: Any, name: str, default: bool) -> bool:
    return getattr(message, name) if message.HasField(name) else default


def _places(places: Sequence[TokenLogprobs]) -> Iterator[pb.TokenLogprobs]:
    for place in places:
        yield pb.TokenLogprobs(token_id=place.token_id, logprob=place.logprob, top=_top(place.top))


def _top(top: Sequence[tuple[int, float]]) -> pb.TopTokens:
    return pb.TopTokens(
        token_ids=[token_id for token_id, _ in top], logprobs=[logprob for _, logprob in top]
    )


def _finish(finish: Finish) -> pb.Finish:
    message = pb.Finish(
        reason=_REASONS[finish.reason], usage=_usage(finish.usage), timing=_timing(finish.timing)
    )
    if isinstance(finish.matched, str):
        message.stop_text = finish.matched
    elif finish.matched is not None:
        message.stop_token_id = finish.matched
    return message


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        draft_tokens=usage.draft_tokens,
        accepted_tokens=usage.accepted_tokens,
    )


def _timing(timing: Timing) -> pb.Timing:
    return pb.Timing(queue_s=timing.queue_s, prefill_s=timing.prefill_s, decode_s=timing.decode_s)
