"""The client: `Client` for threads, `AsyncClient` for an event loop. Both say the same.

    with Client("127.0.0.1:9000") as client:
        for event in client.chat([{"role": "user", "content": "Hello"}]):
            print(event.text, end="", flush=True)

Answers are the messages of inference.proto and control.proto. A call that fails raises
grpc.RpcError, whose `code()` and `details()` say why; `bad_fields` names the fields at fault. A
call is tried again as `RetryPolicy` says, a stream until its first event. Its deadline, and so the
request's, counts over all tries.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pallasite.proto import control_pb2, control_pb2_grpc, inference_pb2_grpc
from pallasite.proto import inference_pb2 as pb
from pallasite.proto.inference_pb2 import ChatPrompt, SamplingParams
from pallasite.server.client_async import AsyncClient, AsyncStream
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
from pallasite.server.client_retry import Deadline, RetryPolicy, bad_fields, retry_after_s

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChatPrompt",
    "Client",
    "RetryPolicy",
    "SamplingParams",
    "Stream",
    "Tls",
    "bad_fields",
    "retry_after_s",
]


class Stream:
    """The events of one call. Iterate once; `cancel`, from any thread, ends it and its request.

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

    def __iter__(self) -> Iterator[pb.GenerateEvent]:
        deadline = Deadline(self._timeout_s)
        num_attempts = 0
        while not self._is_cancelled:
            num_attempts += 1
            self._call = self._begin(deadline.left_s)
            if self._is_cancelled:  # since the loop looked, when there was no call to end
                self._call.cancel()
            has_begun = False
            try:
                for event in self._call:
                    if not has_begun:
                        has_begun = True
                        self.request_id = request_id_of(self._call.initial_metadata())
                    yield event
                return
            except grpc.RpcError as error:
                if self._is_cancelled:
                    return
                left_s = deadline.left_s
                delay_s = None if has_begun else self._policy.delay_s(error, num_attempts, left_s)
                if delay_s is None:
                    raise
            finally:
                self._call.cancel()
            time.sleep(delay_s)

    def cancel(self) -> None:
        """Ends the call and the iteration."""
        self._is_cancelled = True
        if self._call is not None:
            self._call.cancel()


class Client:
    """A server's client for threads; each call returns when its answer is there.

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
            self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, tls.credentials(), options=CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all calls and the connection."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: pb.SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Stream:
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
    ) -> Stream:
        """Answers a chat: messages with "role" and "content"."""
        request = generate_request(chat_prompt(messages), sampling, priority, adapter)
        return self._stream(self._inference.Generate, request, request_id, timeout_s)

    def prefill(
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
        return self._unary(self._inference.Prefill, request, timeout_s, request_id)

    def decode(self, handle: pb.KvHandle, *, timeout_s: float | None = None) -> Stream:
        """Streams what follows a prefill's first token."""
        request = pb.DecodeRequest(handle_id=handle.handle_id, epoch=handle.epoch)
        return self._stream(self._inference.Decode, request, "", timeout_s)

    def release(self, handle: pb.KvHandle, *, timeout_s: float | None = None) -> None:
        """Gives a handle's pages back."""
        request = pb.ReleaseKvRequest(handle_id=handle.handle_id, epoch=handle.epoch)
        self._unary(self._inference.ReleaseKv, request, timeout_s)

    def extend_lease(
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
        answer = self._unary(self._inference.ExtendLease, request, timeout_s)
        return answer.handle

    def tokenize(self, prompt: Prompt, *, timeout_s: float | None = None) -> list[int]:
        """The token ids of a text or a ChatPrompt."""
        answer = self._unary(self._inference.Tokenize, tokenize_request(prompt), timeout_s)
        return list(answer.token_ids)

    def detokenize(self, token_ids: Iterable[int], *, timeout_s: float | None = None) -> str:
        """The text of token ids, without the special ones."""
        request = pb.DetokenizeRequest(token_ids=token_ids)
        answer = self._unary(self._inference.Detokenize, request, timeout_s)
        return answer.text

    def score(
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
        return self._unary(self._inference.Score, request, timeout_s, request_id)

    def server_info(self, *, timeout_s: float | None = None) -> control_pb2.GetServerInfoResponse:
        """What the server is."""
        request = control_pb2.GetServerInfoRequest()
        return self._unary(self._control.GetServerInfo, request, timeout_s)

    def model_info(self, *, timeout_s: float | None = None) -> control_pb2.GetModelInfoResponse:
        """What the served model is, in numbers."""
        request = control_pb2.GetModelInfoRequest()
        return self._unary(self._control.GetModelInfo, request, timeout_s)

    def load(self, *, timeout_s: float | None = None) -> control_pb2.GetLoadResponse:
        """How busy the engine is."""
        request = control_pb2.GetLoadRequest()
        return self._unary(self._control.GetLoad, request, timeout_s)

    def abort(self, request_id: str, *, timeout_s: float | None = None) -> bool:
        """Ends a request; False where none of that name was in flight."""
        request = control_pb2.AbortRequest(request_id=request_id)
        answer = self._unary(self._control.Abort, request, timeout_s)
        return answer.was_in_flight

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Waits until the server says that it serves; False where it has not within timeout_s
        seconds."""
        deadline = Deadline(timeout_s)
        request = health_pb2.HealthCheckRequest()
        while True:
            try:
                answer = self._health.Check(request, timeout=deadline.left_s)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return True
            except grpc.RpcError as error:
                if error.code() not in NOT_YET:
                    raise
            if not deadline.left_s:
                return False
            time.sleep(POLL_S)

    def _stream(
        self, method: Any, request: Any, request_id: str, timeout_s: float | None
    ) -> Stream:
        metadata = call_metadata(self._api_key, request_id)

        def begin(left_s: float | None) -> Any:
            return method(request, timeout=left_s, metadata=metadata)

        return Stream(begin, self._policy, self._timeout_s if timeout_s is None else timeout_s)

    def _unary(
        self, method: Any, request: Any, timeout_s: float | None, request_id: str = ""
    ) -> Any:
        deadline = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        metadata = call_metadata(self._api_key, request_id)
        num_attempts = 0
        while True:
            num_attempts += 1
            try:
                return method(request, timeout=deadline.left_s, metadata=metadata)
            except grpc.RpcError as error:
                delay_s = self._policy.delay_s(error, num_attempts, deadline.left_s)
                if delay_s is None:
                    raise
            time.sleep(delay_s)
