"""What the command line says while it works, on standard error, so that results stay alone."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

_T = TypeVar("_T")
_INTERVAL_S = 2.0


def progress_printer() -> Callable[[str], None]:
    """A progress function that prints each message with the seconds since now."""
    start = time.monotonic()

    def show(message: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {message}", file=sys.stderr, flush=True)

    return show


async def gather_shown(
    calls: Sequence[Callable[[], Awaitable[_T]]],
    at_once: int,
    what: str,
    show: Callable[[str], None],
) -> list[_T]:
    """Runs calls, `at_once` at a time, and returns their results in order.

    Every two seconds it shows how many are done, as "`what` 3 of 10". The first error ends all.
    """
    free = asyncio.Semaphore(at_once)
    last = time.monotonic()
    num_done = 0

    async def run(call: Callable[[], Awaitable[_T]]) -> _T:
        nonlocal last, num_done
        async with free:
            result = await call()
        num_done += 1
        if time.monotonic() - last >= _INTERVAL_S:
            last = time.monotonic()
            show(f"{what} {num_done} of {len(calls)}")
        return result

    tasks = [asyncio.ensure_future(run(call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        # Each ends its own request before whatever they all used is closed.
        await asyncio.gather(*tasks, return_exceptions=True)
