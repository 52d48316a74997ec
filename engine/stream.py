"""The stream of events of one request, from the engine's thread to whoever reads it."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace

from pallasite.engine.request import KvHandle, TokenEvent


class TokenStream:
    """Yields each completion's events, synchronously or asynchronously, to one reader.

    It ends once all `num_completions` have finished. Events that a lagging reader has not taken
    are joined, so that it holds one event a completion at most.

    Attributes:
        request_id: the request's name for `Engine.abort`.
        is_bounded: whether a reader that lags too far behind ends the request.
        handle: after `Engine.prefill`, the lease on the prompt's pages, once the stream has ended.
    """

    def __init__(self, request_id: str, num_completions: int = 1) -> None:
        self.request_id = request_id
        self.is_bounded = True
        self.handle: KvHandle | None = None
        self._num_open = num_completions
        self._pending: dict[int, TokenEvent] = {}
        self._order: deque[int] = deque()
        self._unread = 0
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def num_unread(self) -> int:
        """Tokens put and not yet taken."""
        return self._unread

    @property
    def is_complete(self) -> bool:
        """Whether the last event of every completion was put."""
        return self._num_open <= 0

    def put(self, event: TokenEvent, handle: KvHandle | None = None) -> None:
        """Adds an event; a handle, like a finish, is a completion's last. Engine's thread only."""
        with self._changed:
            earlier = self._pending.get(event.index)
            if earlier is None:
                self._order.append(event.index)
            self._pending[event.index] = event if earlier is None else _join(earlier, event)
            self._unread += len(event.token_ids)
            if handle is not None:
                self.handle = handle
            if event.finish is not None or handle is not None:
                self._num_open -= 1
            self._changed.notify()

    def take_waiter(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None:
        """Hands over the asynchronous reader that waits, if one does, for `wake` to resume."""
        with self._changed:
            waiter, self._waiter = self._waiter, None
            return waiter

    def __iter__(self) -> Iterator[TokenEvent]:
        while True:
            with self._changed:
                while not self._order and self._num_open > 0:
                    self._changed.wait()
                if not self._order:
                    return
                event = self._take()
            yield event

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        loop = asyncio.get_running_loop()
        while True:
            future = None
            with self._changed:
                if self._order:
                    event = self._take()
                elif self._num_open <= 0:
                    return
                else:
                    future = loop.create_future()
                    self._waiter = (loop, future)
            if future is None:
                yield event
            else:
                await future

    def _take(self) -> TokenEvent:
        event = self._pending.pop(self._order.popleft())
        self._unread -= len(event.token_ids)
        return event


def wake(streams: Iterable[TokenStream]) -> None:
    """Resumes the asynchronous readers of these streams, with one call into each event loop."""
    futures: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for stream in streams:
        waiter = stream.take_waiter()
        if waiter is not None:
            futures.setdefault(waiter[0], []).append(waiter[1])
    for loop, waiting in futures.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_resolve, waiting)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _join(earlier: TokenEvent, later: TokenEvent) -> TokenEvent:
    return replace(
        earlier,
        token_ids=earlier.token_ids + later.token_ids,
        logprobs=earlier.logprobs + later.logprobs,
        prompt_logprobs=earlier.prompt_logprobs
        if later.prompt_logprobs is None
        else later.prompt_logprobs,
        finish=later.finish,
    )
