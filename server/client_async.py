"""The asynchronous client; `pallasite.server.client` tells what both have in common."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pallasite.proto import control_pb2, control_pb2_grpc, inference_pb2_grpc
from pallasite.proto import inference_pb2 as pb
from pallasite.server.client_messages import (
    CHANNEL_OPTIONS,
    NOT_YET,
    POLL_S,
    Prompt,
    Tls,
    call_metadata,
    chat_prompt,
    generate_request,
    request_id_of,
    score_request,
    tokenize_request,
)
from pallasite.server.client_retry import Deadline, RetryPolicy


class AsyncStream:
    """The events of one call. Iterate once; `cancel` ends it and its request.

    Attributes:
        request_id: the server's name for the request, known from the first event on.
    """

    def __init__(
        self, begin: Callable[[float | None], Any], policy: RetryPolicy, timeout_s: float | None
    ) -> None:
        self.request_id = ""
        self._begin = begin
        self._policy = policy
        self._timeout_s = timeout_s
        self._call: Any = None
        self._is_cancelled = False

    async def __aiter__(self) -> AsyncIterator[pb.GenerateEvent]:
        deadline = Deadline(self._timeout_s)
        num_attempts = 0
        while not self._is_cancelled:
            num_attempts += 1
            self._call = self._begin(deadline.left_s)
            has_begun = False
            try:
                async for event in self._call:
                    if not has_begun:
                        has_begun = True
                        self.request_id = request_id_of(await self._call.initial_metadata())
                    yield event
                return
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._is_cancelled and not (task and task.cancelling()):
                    return
                raise
            except grpc.RpcError as error:
                left_s = deadline.left_s
                delay_s = None if has_begun else self._policy.delay_s(error, num_attempts, left_s)
                if delay_s is None:
                    raise
            finally:
                self._call.cancel()
            await asyncio.sleep(delay_s)

    def cancel(self) -> None:
        """Ends the call and the iteration."""
        self._is_cancelled = True
        if self._call is not None:
            self._call.cancel()


class AsyncClient:
    """A server's client for one event loop.

    `timeout_s` bounds every call that is not given its own; None never ends one.
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        policy: RetryPolicy | None = None,
        timeout_s: float | None = 600.0,
    ) -> None:
        """Connects to `target` (HOST:PORT) at the first call. Raises OSError for a TLS file that
        cannot be read."""
        self._api_key = api_key
        self._policy = policy or RetryPolicy()
        self._timeout_s = timeout_s
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(
                target, tls.credentials(), options=CHANNEL_OPTIONS
            )
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all calls and the connection."""
        await self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: pb.SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncStream:
        """Completes a prompt: a text, token ids or a ChatPrompt."""
        request = generate_request(prompt, sampling, priority, adapter)
        return self._stream(self._inference.Generate, request, request_id, timeout_s)

    def chat(
        self,
        messages: Iterable[Mapping[str, str]],
        sampling: pb.SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncStream:
        """Answers a chat: messages with "role" and "content"."""
        request = generate_request(chat_prompt(messages), sampling, priority, adapter)
        return self._stream(self._inference.Generate, request, request_id, timeout_s)

    async def prefill(
        self,
        prompt: Prompt,
        sampling: pb.SamplingParams | None = None,
        *,
        lease_s: float | None = None,
        adapter: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> pb.PrefillResponse:
        """Computes a prompt and its first token, and leases their pages for lease_s seconds; None
        takes the server's longest."""
        request = pb.PrefillRequest(
            request=generate_request(prompt, sampling, 0, adapter), lease_s=lease_s
        )
        return await self._unary(self._inference.Prefill, request, timeout_s, request_id)

    def decode(self, handle: pb.KvHandle, *, timeout_s: float | None = None) -> AsyncStream:
        """Streams what follows a prefill's first token."""
        request = pb.DecodeRequest(handle_id=handle.handle_id, epoch=handle.epoch)
        return self._stream(self._inference.Decode, request, "", timeout_s)

    async def release(self, handle: pb.KvHandle, *, timeout_s: float | None = None) -> None:
        """Gives a handle's pages back."""
        request = pb.ReleaseKvRequest(handle_id=handle.handle_id, epoch=handle.epoch)
        await self._unary(self._inference.ReleaseKv, request, timeout_s)

    async def extend_lease(
        self,
        handle: pb.KvHandle,
        lease_s: float | None = None,
        *,
        timeout_s: float | None = None,
    ) -> pb.KvHandle:
        """Begins a handle's lease anew, for lease_s seconds; None takes the server's longest."""
        request = pb.ExtendLeaseRequest(
            handle_id=handle.handle_id, epoch=handle.epoch, lease_s=lease_s
        )
        answer = await self._unary(self._inference.ExtendLease, request, timeout_s)
        return answer.handle

    async def tokenize(self, prompt: Prompt, *, timeout_s: float | None = None) -> list[int]:
        """The token ids of a text or a ChatPrompt."""
        answer = await self._unary(self._inference.Tokenize, tokenize_request(prompt), timeout_s)
        return list(answer.token_ids)

    async def detokenize(self, token_ids: Iterable[int], *, timeout_s: float | None = None) -> str:
        """The text of token ids, without the special ones."""
        request = pb.DetokenizeRequest(token_ids=token_ids)
        answer = await self._unary(self._inference.Detokenize, request, timeout_s)
        return answer.text

    async def score(
        self,
        prompt: Prompt,
        *,
        top: int = 5,
        priority: int = 0,
        adapter: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> pb.ScoreResponse:
        """The log-probability of each token of a prompt, and the `top` likeliest tokens at each
        position."""
        request = score_request(prompt, top, priority, adapter)
        return await self._unary(self._inference.Score, request, timeout_s, request_id)

    async def server_info(
        self, *, timeout_s: float | None = None
    ) -> control_pb2.GetServerInfoResponse:
        """What the server is."""
        request = control_pb2.GetServerInfoRequest()
        return await self._unary(self._control.GetServerInfo, request, timeout_s)

    async def model_info(
        self, *, timeout_s: float | None = None
    ) -> control_pb2.GetModelInfoResponse:
        """What the served model is, in numbers."""
        request = control_pb2.GetModelInfoRequest()
        return await self._unary(self._control.GetModelInfo, request, timeout_s)

    async def load(self, *, timeout_s: float | None = None) -> control_pb2.GetLoadResponse:
        """How busy the engine is."""
        request = control_pb2.GetLoadRequest()
        return await self._unary(self._control.GetLoad, request, timeout_s)

    async def abort(self, request_id: str, *, timeout_s: float | None = None) -> bool:
        """Ends a request; False where none of that name was in flight."""
        request = control_pb2.AbortRequest(request_id=request_id)
        answer = await self._unary(self._control.Abort, request, timeout_s)
        return answer.was_in_flight

    async def wait_until_ready(self, timeout_s: float) -> bool:
        """Waits until the server says that it serves; False where it has not within timeout_s
        seconds."""
        deadline = Deadline(timeout_s)
        request = health_pb2.HealthCheckRequest()
        while True:
            try:
                answer = await self._health.Check(request, timeout=deadline.left_s)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return True
            except grpc.RpcError as error:
                if error.code() not in NOT_YET:
                    raise
            if not deadline.left_s:
                return False
            await asyncio.sleep(POLL_S)

    def _stream(
        self, method: Any, request: Any, request_id: str, timeout_s: float | None
    ) -> AsyncStream:
        metadata = call_metadata(self._api_key, request_id)

        def begin(left_s: float | None) -> Any:
            return method(request, timeout=left_s, metadata=metadata)

        return AsyncStream(begin, self._policy, self._timeout_s if timeout_s is None else timeout_s)

    async def _unary(
        self, method: Any, request: Any, timeout_s: float | None, request_id: str = ""
    ) -> Any:
        deadline = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        metadata = call_metadata(self._api_key, request_id)
        num_attempts = 0
        while True:
            num_attempts += 1
            try:
                return await method(request, timeout=deadline.left_s, metadata=metadata)
            except grpc.RpcError as error:
                delay_s = self._policy.delay_s(error, num_attempts, deadline.left_s)
                if delay_s is None:
                    raise
            await asyncio.sleep(delay_s)
