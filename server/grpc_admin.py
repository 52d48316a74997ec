"""The Admin service, for the operator on the same machine: draining, profiles, audits, adapters."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import jax

from pallasite.engine.errors import ConfigError, ErrorCode, RequestError
from pallasite.proto import admin_pb2 as pb
from pallasite.server.contracts import Engine
from pallasite.server.grpc_door import Call

_MAX_PROFILE_S = 60.0
_DEFAULT_PROFILE_S = 10.0


class AdminService:
    """pallasite.v1.Admin, over one engine.

    `drain` is the server's own: it takes seconds, refuses new requests, and says whether those in
    flight ended in time.
    """

    def __init__(
        self,
        engine: Engine,
        drain: Callable[[float], Awaitable[bool]],
        *,
        drain_s: float,
        profile_dir: Path | None,
    ) -> None:
        self._engine = engine
        self._drain = drain
        self._drain_s = drain_s
        self._profile = _Profile(profile_dir)

    async def close(self) -> None:
        """Ends a profile that runs, and writes it."""
        await self._profile.stop()

    async def drain(self, request: pb.DrainRequest, call: Call) -> pb.DrainResponse:
        """Refuses new requests and waits for those in flight."""
        timeout_s = request.timeout_s if request.HasField("timeout_s") else self._drain_s
        if not 0 <= timeout_s <= 86400:
            raise RequestError(
                f"got timeout_s={timeout_s}; allowed are 0 to 86400; change it", field="timeout_s"
            )
        return pb.DrainResponse(is_drained=await self._drain(timeout_s))

    async def flush_prefix_cache(
        self, request: pb.FlushPrefixCacheRequest, call: Call
    ) -> pb.FlushPrefixCacheResponse:
        """Refused: the engine has no prefix cache."""
        await call.context.abort(
            grpc.StatusCode.UNIMPLEMENTED,
            "got FlushPrefixCache; this engine keeps no prefix cache; there is nothing to flush",
        )
        raise AssertionError("gRPC went on after an abort")

    async def start_profile(
        self, request: pb.StartProfileRequest, call: Call
    ) -> pb.StartProfileResponse:
        """Begins a profile."""
        given = request.HasField("max_duration_s")
        duration_s = request.max_duration_s if given else _DEFAULT_PROFILE_S
        if not 0 < duration_s <= _MAX_PROFILE_S:
            raise RequestError(
                f"got max_duration_s={duration_s}; allowed are over 0 to {_MAX_PROFILE_S:g}; change"
                " it",
                field="max_duration_s",
            )
        await self._profile.start(duration_s)
        return pb.StartProfileResponse()

    async def stop_profile(
        self, request: pb.StopProfileRequest, call: Call
    ) -> pb.StopProfileResponse:
        """Ends the profile."""
        duration_s = await self._profile.stop()
        if duration_s is None:
            raise RequestError(
                "got StopProfile while none runs; one may have ended by itself; start one first",
                code=ErrorCode.FAILED_PRECONDITION,
            )
        return pb.StopProfileResponse(duration_s=duration_s)

    async def audit_kv(self, request: pb.AuditKvRequest, call: Call) -> pb.AuditKvResponse:
        """Counts and checks the cache's pages."""
        # It waits for the step that runs; streams and health go on meanwhile.
        audit = await asyncio.to_thread(self._engine.audit)
        return pb.AuditKvResponse(
            num_pages=audit.total,
            num_free_pages=audit.free,
            num_used_pages=audit.used,
            num_leased_pages=audit.leased,
            problems=audit.problems,
        )

    async def load_adapter(
        self, request: pb.LoadAdapterRequest, call: Call
    ) -> pb.LoadAdapterResponse:
        """Loads an adapter."""
        if not request.folder or "\0" in request.folder:
            raise RequestError(
                "got no folder, or a NUL in its name; it must be a PEFT adapter's on this machine;"
                " name one",
                field="folder",
            )
        try:
            with _named():
                # It reads files and waits for the step that runs.
                await asyncio.to_thread(
                    self._engine.load_adapter, request.name, Path(request.folder)
                )
        except ConfigError as error:
            raise RequestError(str(error), field="folder") from error
        return pb.LoadAdapterResponse()

    async def unload_adapter(
        self, request: pb.UnloadAdapterRequest, call: Call
    ) -> pb.UnloadAdapterResponse:
        """Takes an adapter's name away."""
        with _named():
            await asyncio.to_thread(self._engine.unload_adapter, request.name)
        return pb.UnloadAdapterResponse()


@contextmanager
def _named() -> Iterator[None]:
    """Names the field of an error raised inside as Admin's messages do: an adapter is a `name`."""
    try:
        yield
    except RequestError as error:
        field = "name" if error.field == "adapter" else error.field
        raise RequestError(str(error), code=error.code, field=field) from error


class _Profile:
    """JAX's profiler, which can run once at a time in a process, and stops by itself."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lock = asyncio.Lock()
        self._start: float | None = None
        self._timer: asyncio.Task[None] | None = None

    async def start(self, duration_s: float) -> None:
        """Begins; RequestError where there is no folder or one runs."""
        if self._folder is None:
            raise RequestError(
                "got StartProfile on a server without a profile folder; it must be given at start;"
                " start the server with one",
                code=ErrorCode.FAILED_PRECONDITION,
            )
        async with self._lock:
            if self._start is not None:
                raise RequestError(
                    "got StartProfile while one runs; one runs at a time; stop that one first",
                    code=ErrorCode.FAILED_PRECONDITION,
                )
            await asyncio.to_thread(jax.profiler.start_trace, str(self._folder))
            self._start = time.monotonic()
            self._timer = asyncio.get_running_loop().create_task(self._stop_after(duration_s))

    async def stop(self) -> float | None:
        """Ends it, and says how many seconds it took; None where none runs."""
        async with self._lock:
            if self._start is None:
                return None
            duration_s = time.monotonic() - self._start
            self._start = None
            timer, self._timer = self._timer, None
            if timer is not None and timer is not asyncio.current_task():
                timer.cancel()
            await asyncio.to_thread(jax.profiler.stop_trace)
            return duration_s

    async def _stop_after(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
        await self.stop()
