"""Whether the engine lives: its own heartbeat turned into the health service's answers.

An engine that is dead or hangs must not look healthy because the front still answers.
"""

import asyncio
import time
from collections.abc import Sequence

from grpc_health.v1 import health, health_pb2

from pallasite.server.contracts import Engine

_TICK_S = 0.25


class Heartbeat:
    """Judges an engine by its steps: with requests to run, one must end every stall_s seconds."""

    def __init__(self, engine: Engine, stall_s: float) -> None:
        self._engine = engine
        self._stall_s = stall_s
        self._busy_since: float | None = None

    def is_beating(self, now: float) -> bool:
        """Whether the engine lives at `now`, a time.monotonic. To be asked several times in
        stall_s: an engine that was idle is given that long for its first step."""
        load, metrics = self._engine.load(), self._engine.metrics
        if not (load.num_running or load.num_waiting):
            self._busy_since = None
        elif self._busy_since is None:
            self._busy_since = now
        if not metrics.is_alive:
            return False
        if self._busy_since is None:
            return True
        return now - max(self._busy_since, metrics.last_step_monotonic_s) < self._stall_s


async def report_health(
    heartbeat: Heartbeat, servicer: health.aio.HealthServicer, services: Sequence[str]
) -> None:
    """Keeps the status of `services` what the heartbeat says; runs until cancelled.

    A servicer that has entered its graceful shutdown stays NOT_SERVING.
    """
    was_beating = None
    while True:
        is_beating = heartbeat.is_beating(time.monotonic())
        if is_beating != was_beating:
            status = health_pb2.HealthCheckResponse
            for service in services:
                await servicer.set(service, status.SERVING if is_beating else status.NOT_SERVING)
            was_beating = is_beating
        await asyncio.sleep(_TICK_S)
