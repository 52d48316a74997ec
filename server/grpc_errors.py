"""What a failed call tells its caller: status, message, field at fault, and when to try again."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from pallasite.engine.errors import ErrorCode, RequestError

STATUS: Mapping[ErrorCode, grpc.StatusCode] = MappingProxyType(
    {code: grpc.StatusCode[code.name] for code in ErrorCode}
)
# HTTP/2 peers take 8 KiB of headers; the message is in them three times, once with each byte of
# what is not ASCII written as three.
_MAX_MESSAGE_BYTES = 800


def trailers(error: RequestError) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of a failed call.

    `grpc-status-details-bin` holds google.rpc.Status: with BadRequest where the error names a
    field, with RetryInfo where it says when to try again. `grpc-retry-pushback-ms` tells the
    latter to stock clients (gRFC A6).
    """
    details = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message_of(error)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        seconds, fraction = divmod(error.retry_after_s, 1)
        delay = duration_pb2.Duration(seconds=int(seconds), nanos=int(fraction * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if not details:
        return ()
    status = status_pb2.Status(code=STATUS[error.code].value[0], message=message_of(error))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    metadata: tuple[tuple[str, str | bytes], ...] = (
        ("grpc-status-details-bin", status.SerializeToString()),
    )
    if error.retry_after_s is not None:
        pushback_ms = math.ceil(error.retry_after_s * 1000)
        metadata += (("grpc-retry-pushback-ms", str(pushback_ms)),)
    return metadata


def message_of(error: RequestError) -> str:
    """The error's message, short enough for a trailer."""
    return str(error).encode(errors="replace")[:_MAX_MESSAGE_BYTES].decode(errors="ignore")
