"""Whether the engine lives: its own heartbeat turned into the health service's answers.

An engine that is dead or hangs must not look healthy because the front still answers.
"""

import asyncio
import time
from collections.abc import Sequence

from grpc_health.v1 import health, health_pb2

from pallasite.server.contracts import Engine

_TICK_S = 0.1


def is_beating(engine: Engine, now: float, stall_s: float) -> bool:
    """Whether the engine lives at `now`, a time.monotonic: its loop, which comes round several
    times a second when idle, has come round within stall_s seconds."""
    metrics = engine.metrics
    return metrics.is_alive and now - metrics.last_step_monotonic_s < stall_s


async def report_health(
    engine: Engine, stall_s: float, servicer: health.aio.HealthServicer, services: Sequence[str]
) -> None:
    """Keeps the status of `services` what the heartbeat says; runs until cancelled.

    A servicer that has entered its graceful shutdown stays NOT_SERVING.
    """
    was_beating = None
    while True:
        beats = is_beating(engine, time.monotonic(), stall_s)
        if beats != was_beating:
            status = health_pb2.HealthCheckResponse
            for service in services:
                await servicer.set(service, status.SERVING if beats else status.NOT_SERVING)
            was_beating = beats
        await asyncio.sleep(_TICK_S)
