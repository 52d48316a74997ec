"""The Inference service: each call becomes one of the text engine, its answer messages."""

from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager

from google.protobuf.message import Message

from pallasite.engine.errors import RequestError
from pallasite.engine.request import Finish
from pallasite.proto import inference_pb2 as pb
from pallasite.server import grpc_convert as convert
from pallasite.server.generate import TextEngine
from pallasite.server.grpc_door import Call
from pallasite.server.text_stream import TextStream


class InferenceService:
    """pallasite.v1.Inference, over one text engine."""

    def __init__(self, text_engine: TextEngine) -> None:
        self._text_engine = text_engine

    async def generate(
        self, request: pb.GenerateRequest, call: Call
    ) -> AsyncIterator[pb.GenerateEvent]:
        """Completes a prompt."""
        with _fields_of(request):
            stream = await self._text_engine.generate(convert.text_request(request, call))
        with closing(stream):
            async for message in _messages(stream, call):
                yield message

    async def prefill(self, request: pb.PrefillRequest, call: Call) -> pb.PrefillResponse:
        """Computes a prompt and its first token, and leases their pages."""
        lease_s = request.lease_s if request.HasField("lease_s") else None
        await _return_id(call.request_id, call)
        with _fields_of(request.request, "request"):
            handle, event = await self._text_engine.prefill(
                convert.text_request(request.request, call), lease_s
            )
        if event.finish is not None:
            _raise_error(event.finish)
        response = pb.PrefillResponse(event=convert.generate_event(event))
        if handle is not None:
            response.handle.CopyFrom(convert.kv_handle(handle))
        return response

    async def decode(
        self, request: pb.DecodeRequest, call: Call
    ) -> AsyncIterator[pb.GenerateEvent]:
        """Streams what follows the first token of a prefill."""
        with _fields_of(request):
            stream = self._text_engine.decode(
                request.handle_id, request.epoch, call.tenant, call.timeout_s, call.request_id
            )
        with closing(stream):
            async for message in _messages(stream, call):
                yield message

    async def release_kv(self, request: pb.ReleaseKvRequest, call: Call) -> pb.ReleaseKvResponse:
        """Gives a handle's pages back."""
        with _fields_of(request):
            self._text_engine.release(request.handle_id, request.epoch, call.tenant)
        return pb.ReleaseKvResponse()

    async def extend_lease(
        self, request: pb.ExtendLeaseRequest, call: Call
    ) -> pb.ExtendLeaseResponse:
        """Begins a handle's lease anew."""
        lease_s = request.lease_s if request.HasField("lease_s") else None
        with _fields_of(request):
            handle = self._text_engine.extend_lease(
                request.handle_id, request.epoch, call.tenant, lease_s
            )
        return pb.ExtendLeaseResponse(handle=convert.kv_handle(handle))

    async def tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        """The token ids of a text or of a chat."""
        with _fields_of(request):
            token_ids = await self._text_engine.encoder.encode(convert.prompt(request))
        return pb.TokenizeResponse(token_ids=token_ids)

    async def detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        """The text of token ids."""
        skips = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        text = await self._text_engine.encoder.decode(tuple(request.token_ids), skips_special=skips)
        return pb.DetokenizeResponse(text=text)

    async def score(self, request: pb.ScoreRequest, call: Call) -> pb.ScoreResponse:
        """The log-probabilities of a prompt."""
        top = request.top if request.HasField("top") else 5
        await _return_id(call.request_id, call)
        with _fields_of(request):
            scores = await self._text_engine.score(convert.score_request(request, call), top)
        return convert.score_response(scores)


async def _messages(stream: TextStream, call: Call) -> AsyncIterator[pb.GenerateEvent]:
    """The stream's events as messages; then, where a completion failed, its error is raised."""
    await _return_id(stream.request_id, call)
    failed = None
    async for event in stream:
        if event.finish is not None and event.finish.error is not None:
            failed = failed or event.finish
        yield convert.generate_event(event)
    if failed is not None:
        _raise_error(failed)


async def _return_id(request_id: str, call: Call) -> None:
    """Sends a request's name back, where it has one yet."""
    if request_id:
        await call.context.send_initial_metadata((("x-request-id", request_id),))


def _raise_error(finish: Finish) -> None:
    if finish.error is not None:
        raise finish.error


@contextmanager
def _fields_of(request: Message, path: str = "") -> Iterator[None]:
    """Names the field of an error raised inside as the call's message names it."""
    try:
        yield
    except RequestError as error:
        raise RequestError(
            str(error),
            code=error.code,
            field=convert.field_path(error.field, request, path),
            retry_after_s=error.retry_after_s,
        ) from error
