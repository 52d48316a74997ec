"""What every call of ours goes through: size, key, form, admission, and errors to statuses.

A service is a class with one method for each of its .proto service's; `handlers` binds them, so a
method that is missing is an error at start.
"""

import logging
import re
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.server.auth import ApiKeys
from pallasite.server.grpc_errors import STATUS, message_of, trailers
from pallasite.server.grpc_messages import parse

# grpc.aio.ServicerContext describes it, and is no base of the class that gRPC hands over.
Context = Any

_log = logging.getLogger(__name__)

_BUSY_RETRY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a method may know of the call that it answers.

    Attributes:
        tenant: whose key was shown; "" where none is needed.
        request_id: the caller's x-request-id, or "".
        timeout_s: seconds until the call's deadline, or None.
        context: gRPC's own view of it.
    """

    tenant: str
    request_id: str
    timeout_s: float | None
    context: Context


class Door:
    """Admission to the services of one server; counts their calls together."""

    def __init__(self, keys: ApiKeys, *, max_message_bytes: int, max_calls: int) -> None:
        self._keys = keys
        self._max_message_bytes = max_message_bytes
        self._max_calls = max_calls
        self.num_calls = 0

    def handlers(self, service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
        """gRPC's handlers for a service, each method bound to the servicer's of the same name in
        snake_case: a coroutine function, or an async generator function where it streams."""
        methods = {
            method.name: self._handler(method, getattr(servicer, _snake_case(method.name)))
            for method in service.methods
        }
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    def _handler(
        self, method: MethodDescriptor, answer: Callable[[Any, Call], Any]
    ) -> grpc.RpcMethodHandler:
        request_type = message_factory.GetMessageClass(method.input_type)
        response_type = message_factory.GetMessageClass(method.output_type)
        # A malformed message must not fail inside gRPC, which would call it INTERNAL.
        serialization = {
            "request_deserializer": bytes,
            "response_serializer": response_type.SerializeToString,
        }
        if method.server_streaming:

            async def write_all(request: Message, call: Call) -> None:
                # Closed at once where the caller goes away, not when it is collected.
                async with aclosing(answer(request, call)) as responses:
                    async for response in responses:
                        await call.context.write(response)

            async def stream(data: bytes, context: Context) -> None:
                await self._guarded(write_all, request_type, data, context)

            return grpc.unary_stream_rpc_method_handler(stream, **serialization)

        async def unary(data: bytes, context: Context) -> Message:
            return await self._guarded(answer, request_type, data, context)

        return grpc.unary_unary_rpc_method_handler(unary, **serialization)

    async def _guarded(
        self,
        answer: Callable[[Any, Call], Awaitable[Any]],
        request_type: type[Message],
        data: bytes,
        context: Context,
    ) -> Any:
        metadata = dict(context.invocation_metadata() or ())
        tenant = self._keys.tenant(metadata.get("authorization"))
        if tenant is None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "got no API key that this server knows; it takes `authorization: Bearer KEY`; send"
                " a key that the operator gave you",
            )
            raise AssertionError("gRPC went on after an abort")
        self.num_calls += 1
        try:
            call = Call(
                tenant=tenant,
                request_id=metadata.get("x-request-id", ""),
                timeout_s=context.time_remaining(),
                context=context,
            )
            self._check_admission()
            return await answer(parse(request_type, data, self._max_message_bytes), call)
        except RequestError as error:
            await abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:  # noqa: BLE001 - gRPC would send whatever it is, with its own text
            # The trace goes to the log alone.
            _log.exception("a call with %s failed", request_type.DESCRIPTOR.full_name)
            await context.abort(
                grpc.StatusCode.INTERNAL,
                "the server failed at this call; the call may be well formed; send it again, and"
                " tell the operator if it fails again",
            )
        finally:
            self.num_calls -= 1

    def _check_admission(self) -> None:
        if self.num_calls > self._max_calls:
            raise RequestError(
                f"got a call beside {self._max_calls} others in flight; that is the limit; try"
                " again later",
                code=ErrorCode.RESOURCE_EXHAUSTED,
                retry_after_s=_BUSY_RETRY_S,
            )


async def abort(context: Context, error: RequestError) -> NoReturn:
    """Ends a call with the status and details of an error."""
    await context.abort(STATUS[error.code], message_of(error), trailers(error))
    raise AssertionError("gRPC went on after an abort")


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
