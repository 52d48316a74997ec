"""The command line's completions from a server, by the client; knows no engine."""

import argparse
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import grpc

from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.engine.request import Finish, FinishReason, Timing, TokenLogprobs, Usage
from pallasite.models.errors import ConfigError
from pallasite.proto import inference_pb2 as pb
from pallasite.server.client import AsyncClient, Tls, bad_fields
from pallasite.server.client_messages import chat_prompt
from pallasite.server.progress import gather_shown, progress_printer
from pallasite.server.text_request import Scores, TextEvent, TextRequest

_CALLS_AT_ONCE = 32
# Codes that are ours under the same name; what the network adds is told as UNAVAILABLE.
_CODES = {code.name: code for code in ErrorCode}
_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
    pb.FINISH_REASON_ERROR: FinishReason.ERROR,
}


class ServerSession:
    """A server's completions."""

    def __init__(self, client: AsyncClient, progress: Callable[[str], None]) -> None:
        self._client = client
        self._progress = progress

    async def generate(self, request: TextRequest) -> AsyncIterator[TextEvent]:
        """Yields the events of a request. Raises RequestError where it failed."""
        stream = self._client.generate(
            _prompt(request),
            _sampling(request),
            adapter=request.adapter,
            timeout_s=request.timeout_s,
        )
        with_prompt_logprobs: set[int] = set()
        if request.params.prompt_logprobs is not None:
            with_prompt_logprobs.update(range(request.params.n))
        try:
            with told_as_request_errors():
                async for message in stream:
                    yield _text_event(message, message.index in with_prompt_logprobs)
                    with_prompt_logprobs.discard(message.index)
        finally:
            stream.cancel()

    async def score(
        self, sequences: Sequence[Sequence[int]], top: int, adapter: str
    ) -> list[Scores]:
        """Scores sequences of token ids. Raises RequestError for the first that failed."""

        async def run(ids: Sequence[int]) -> Scores:
            with told_as_request_errors():
                return _scores(await self._client.score(ids, top=top, adapter=adapter))

        calls = [partial(run, ids) for ids in sequences]
        return await gather_shown(calls, _CALLS_AT_ONCE, "scored", self._progress)


@asynccontextmanager
async def open_server(args: argparse.Namespace) -> AsyncIterator[ServerSession]:
    """A session with the server that the flags name, and that serves MODEL where one is given."""
    try:
        key = None if args.api_key_file is None else args.api_key_file.read_text().strip()
        tls = None if args.server_ca is None else Tls(root_certificates=args.server_ca)
        client = AsyncClient(args.server, api_key=key, tls=tls)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"got a file for --api-key-file or --server-ca that cannot be read"
            f" ({type(error).__name__}); it must be text; check its name and rights"
        ) from error
    async with client:
        if args.model is not None:
            with told_as_request_errors():
                served = (await client.model_info()).model
            if served not in (args.model, Path(args.model).name.removesuffix(".gguf")):
                raise ConfigError(
                    f"got MODEL {Path(args.model).name!r}; the server serves {served!r}; name that"
                    " or leave MODEL out"
                )
        yield ServerSession(client, progress_printer())


@contextmanager
def told_as_request_errors() -> Iterator[None]:
    """Raises RequestError in the place of gRPC's errors."""
    try:
        yield
    except grpc.RpcError as error:
        code = _CODES.get(error.code().name, ErrorCode.UNAVAILABLE)
        message = error.details() or "the call failed"
        has_details = "grpc-status-details-bin" in dict(error.trailing_metadata() or ())
        if error.code() is grpc.StatusCode.UNAVAILABLE and not has_details:
            message = (
                "got no answer from the server; one must listen there; check --server, or start"
                " one with `pallasite serve`"
            )
        field = ", ".join(bad_fields(error))
        raise RequestError(message, code=code, field=field) from error


def _prompt(request: TextRequest) -> str | Sequence[int] | pb.ChatPrompt:
    prompt = request.prompt
    if prompt.messages is not None:
        return chat_prompt(prompt.messages)
    return prompt.token_ids if prompt.token_ids is not None else prompt.text or ""


def _sampling(request: TextRequest) -> pb.SamplingParams:
    params = request.params
    message = pb.SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        n=params.n,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        bad_words=request.bad_words,
        seed=params.seed,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        stop=request.stop,
        stop_token_ids=params.stop_token_ids,
        include_stop=params.include_stop,
        ignore_eos=params.ignore_eos,
        skip_special_tokens=request.skips_special,
    )
    if params.allowed_token_ids is not None:
        message.allowed_token_ids.ids.extend(params.allowed_token_ids)
        message.allowed_token_ids.SetInParent()
    return message


def _text_event(message: pb.GenerateEvent, has_prompt_logprobs: bool) -> TextEvent:
    return TextEvent(
        index=message.index,
        text=message.text,
        token_ids=list(message.token_ids),
        logprobs=[_place(place) for place in message.logprobs],
        prompt_logprobs=(
            [None, *(_place(place) for place in message.prompt_logprobs)]
            if has_prompt_logprobs
            else None
        ),
        finish=_finish(message.finish) if message.HasField("finish") else None,
    )


def _finish(message: pb.Finish) -> Finish:
    kind = message.WhichOneof("matched")
    return Finish(
        reason=_REASONS[message.reason],
        usage=_usage(message.usage),
        timing=_timing(message.timing),
        matched=None if kind is None else getattr(message, kind),
    )


def _scores(message: pb.ScoreResponse) -> Scores:
    return Scores(
        token_ids=tuple(message.token_ids),
        logprobs=(None, *message.logprobs),
        top=tuple(_top(top) for top in message.top),
        usage=_usage(message.usage),
        timing=_timing(message.timing),
    )


def _place(message: pb.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(token_id=message.token_id, logprob=message.logprob, top=_top(message.top))


def _top(message: pb.TopTokens) -> tuple[tuple[int, float], ...]:
    return tuple(zip(message.token_ids, message.logprobs, strict=True))


def _usage(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        completion_tokens=message.completion_tokens,
        draft_tokens=message.draft_tokens,
        accepted_tokens=message.accepted_tokens,
    )


def _timing(message: pb.Timing) -> Timing:
    return Timing(queue_s=message.queue_s, prefill_s=message.prefill_s, decode_s=message.decode_s)
