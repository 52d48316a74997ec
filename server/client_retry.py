"""When a call that failed is tried again, and what its error says. Waits for nothing itself."""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently a call is tried again.

    A call is tried again where no answer has begun and the server cannot be reached
    (UNAVAILABLE), or is busy and says when to come back (RESOURCE_EXHAUSTED with RetryInfo or
    grpc-retry-pushback-ms). Between tries it waits as long as the server says; else, of
    exponentially growing times, a random part ("full jitter").

    Attributes:
        max_attempts: tries in all; 1 never tries again.
        first_backoff_s, max_backoff_s: the first and the longest of the growing times.
    """

    max_attempts: int = 5
    first_backoff_s: float = 0.1
    max_backoff_s: float = 5.0

    def delay_s(
        self, error: grpc.RpcError, num_attempts: int, left_s: float | None
    ) -> float | None:
        """Seconds to wait after the num_attempts-th try failed so; None where to give up, be it
        that the wait would outlast the left_s seconds until the deadline."""
        if num_attempts >= self.max_attempts:
            return None
        told_s = retry_after_s(error)
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            if told_s is None:
                return None
        elif error.code() is not grpc.StatusCode.UNAVAILABLE:
            return None
        if told_s is not None and told_s < 0:
            return None
        longest_s = min(self.max_backoff_s, self.first_backoff_s * 2 ** (num_attempts - 1))
        delay_s = random.uniform(0, longest_s) if told_s is None else told_s
        return None if left_s is not None and delay_s >= left_s else delay_s


class Deadline:
    """What is left of a time that several tries share."""

    def __init__(self, timeout_s: float | None) -> None:
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def left_s(self) -> float | None:
        """Seconds left, at least 0; None without a deadline."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def retry_after_s(error: grpc.RpcError) -> float | None:
    """Seconds after which the server wants the call again, of RetryInfo or
    grpc-retry-pushback-ms; negative where it wants it never; None where it does not say."""
    trailers = dict(error.trailing_metadata() or ())
    pushback = trailers.get("grpc-retry-pushback-ms")
    if pushback is not None:
        # gRFC A6: what is no number of milliseconds means never.
        return int(pushback) / 1000 if str(pushback).isdecimal() else -1.0
    for detail in _details(trailers):
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return info.retry_delay.seconds + info.retry_delay.nanos / 1e9
    return None


def bad_fields(error: grpc.RpcError) -> list[str]:
    """The request fields at fault, of BadRequest."""
    fields = []
    for detail in _details(dict(error.trailing_metadata() or ())):
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
    return fields


def _details(trailers: Mapping[str, str | bytes]) -> list[Any]:
    data = trailers.get("grpc-status-details-bin")
    if not isinstance(data, bytes):
        return []
    return list(status_pb2.Status.FromString(data).details)
