"""What can go wrong with a request. Each protocol maps the code to one of its own."""

from enum import StrEnum

from pallasite.models.errors import CheckpointError, ConfigError

__all__ = ["CheckpointError", "ConfigError", "ErrorCode", "RequestError"]


class ErrorCode(StrEnum):
    """Stable codes. The gRPC door maps each to the status of the same name."""

    INVALID_ARGUMENT = "invalid_argument"
    NOT_FOUND = "not_found"
    PERMISSION_DENIED = "permission_denied"
    FAILED_PRECONDITION = "failed_precondition"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


class RequestError(Exception):
    """A request that cannot be served, or could not be served to its end.

    Attributes:
        code: what kind of error this is.
        field: the request field at fault, in dotted form (`sampling.top_p`), or "" where none is.
        retry_after_s: for RESOURCE_EXHAUSTED and UNAVAILABLE, seconds after which to try again.
    """

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode = ErrorCode.INVALID_ARGUMENT,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.field = field
        self.retry_after_s = retry_after_s


def late_error() -> RequestError:
    """Ends a request whose time is up."""
    return RequestError(
        "the request's deadline passed before it was done; allow it more time, or ask for less",
        code=ErrorCode.DEADLINE_EXCEEDED,
    )


def closed_error() -> RequestError:
    """Refuses or ends a request, since the engine closes."""
    return RequestError(
        "the engine is shutting down; it takes no more requests; send it to another, or later",
        code=ErrorCode.UNAVAILABLE,
        retry_after_s=1.0,
    )


def internal_error(error: Exception) -> RequestError:
    """Ends a request that the engine itself failed."""
    return RequestError(
        f"the engine failed this request ({type(error).__name__}), and it alone; please report it",
        code=ErrorCode.INTERNAL,
    )


def adapter_memory_error() -> RequestError:
    """Refuses an adapter that the devices had no memory for; nothing else was touched."""
    return RequestError(
        "got an adapter that the devices have no memory for; it must fit beside all else that they"
        " hold; try again, or start the server with a lower --cache-tokens or --max-adapters",
        code=ErrorCode.RESOURCE_EXHAUSTED,
    )


def placing_error() -> RequestError:
    """Answers who asked for an adapter that the devices did not take; nothing else is lost."""
    return RequestError(
        "an adapter could not be put on the devices; those that are loaded stay; load it again, and"
        " see the log where that fails, too",
        code=ErrorCode.UNAVAILABLE,
        retry_after_s=1.0,
    )


def lost_adapters_error() -> RequestError:
    """Answers who asked for an adapter that could not be put beside the others: all are lost."""
    return RequestError(
        "loading an adapter failed on the device, and all loaded adapters were lost with it; what"
        " ran has ended, and the engine goes on without any; load them again",
        code=ErrorCode.UNAVAILABLE,
        retry_after_s=1.0,
    )


def step_error(error: Exception) -> RequestError:
    """Ends a request that was on the device when a step failed."""
    return RequestError(
        f"a step failed on the device ({type(error).__name__}); the request was not at fault; send"
        " it again",
        code=ErrorCode.UNAVAILABLE,
        retry_after_s=1.0,
    )
