"""Where callers' threads and the engine's loop meet: open requests by id, and commands to the loop.

Callers get an answer at once; what they ask for is done by the loop, between two steps.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from itertools import count
from typing import TypeVar

from pallasite.engine.errors import ErrorCode, RequestError, closed_error
from pallasite.engine.request import Request
from pallasite.engine.sequence import Group, Sequence, new_group
from pallasite.engine.stream import TokenStream

Command = Callable[[], None]
_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class Intake:
    """The open requests of an engine.

    `schedule` is what the loop does with a sequence that was admitted.
    """

    def __init__(self, max_waiting: int, schedule: Callable[[Sequence], None]) -> None:
        self._max_waiting = max_waiting
        self._schedule = schedule
        self._changed = threading.Condition()
        self._commands: list[Command] = []
        self._queued: list[Group] = []
        self._groups: dict[str, Group] = {}
        self._arrivals = count()
        self._is_draining = False
        self._is_closed = False

    @property
    def num_queued(self) -> int:
        """Sequences that were admitted and that the loop has not taken yet."""
        with self._changed:
            return sum(len(group.sequences) for group in self._queued)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    # From any thread.

    def submit(self, request: Request, num_waiting: int, lease_s: float | None) -> TokenStream:
        """Opens a valid request, beside `num_waiting` sequences that the scheduler has waiting.

        Raises RequestError where the queue is full, the id is in use or the engine closes.
        """
        with self._changed:
            self.check_open()
            waiting = num_waiting + self.num_queued
            if waiting + request.params.n > self._max_waiting:
                raise RequestError(
                    f"got a request while {waiting} wait; allowed are {self._max_waiting}; try"
                    " again later",
                    code=ErrorCode.RESOURCE_EXHAUSTED,
                    retry_after_s=1.0,
                )
            self._check_unused(request.request_id)
            stream = TokenStream(request.request_id or _new_id(), request.params.n)
            group = new_group(request, stream, next(self._arrivals), lease_s)
            self._enqueue(group)
        return stream

    def resume(
        self, take: Callable[[], Sequence], timeout_s: float | None, request_id: str
    ) -> TokenStream:
        """Opens a sequence that was held, as a request of that id, or of a drawn one.

        `take` ends its lease, and what it raises is raised; so is UNAVAILABLE while closing.
        """
        now = time.monotonic()
        with self._changed:
            self.check_open()
            self._check_unused(request_id)
            sequence = take()
            old = sequence.group
            group = Group(
                request=old.request,
                stream=TokenStream(request_id or _new_id()),
                submitted_s=now,
                arrival=next(self._arrivals),
                sequences=[sequence],
            )
            sequence.group = group
            sequence.lease_s = None
            sequence.scheduled_s = sequence.first_token_s = None
            sequence.deadline_s = None if timeout_s is None else now + timeout_s
            self._enqueue(group)
        return group.stream

    def check_open(self) -> None:
        """Raises RequestError UNAVAILABLE where no more requests are taken."""
        if self._is_draining:
            raise closed_error()

    def command(self, command: Command) -> bool:
        """Has the loop do something; False where it has ended."""
        with self._changed:
            if self._is_closed:
                return False
            self._commands.append(command)
            self._changed.notify_all()
            return True

    def ask(self, command: Callable[[], _T]) -> Future[_T] | None:
        """Has the loop answer something; None where it has ended."""
        answer: Future[_T] = Future()

        def run() -> None:
            try:
                answer.set_result(command())
            except BaseException as error:  # noqa: BLE001 - it is the caller's, who waits
                answer.set_exception(error)

        return answer if self.command(run) else None

    def find(self, request_id: str) -> Group | None:
        """Returns the open request of that id."""
        with self._changed:
            return self._open(request_id)

    def promised_pages(self, page_size: int) -> int:
        """Returns the pages that open prefills will lease."""
        with self._changed:
            held = [g for g in self._groups.values() if g.sequences[0].lease_s is not None]
            return sum(-(-len(group.request.prompt_ids) // page_size) for group in held)

    def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the open ones; whether all ended in time."""
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._groups, timeout_s)

    def close(self) -> None:
        """Refuses new requests and tells the loop to end."""
        with self._changed:
            self._is_draining = self._is_closed = True
            self._changed.notify_all()

    # From the loop's thread.

    def run_commands(self) -> None:
        """Does what was asked for since the last call."""
        with self._changed:
            groups, self._queued = self._queued, []
            commands, self._commands = self._commands, []
        # A command may be about any of these requests, so they come first.
        for group in groups:
            for sequence in group.sequences:
                self._schedule(sequence)
        for command in commands:
            try:
                command()
            except Exception:  # the commands after it are other callers'
                logger.exception("a command failed")

    def own(self, owners: Callable[[], list[Sequence]]) -> list[Sequence]:
        """Returns `owners()` and the queued sequences, as of one moment, for the audit."""
        with self._changed:
            return [*owners(), *(s for group in self._queued for s in group.sequences)]

    def wait(self, timeout_s: float) -> None:
        """Sleeps until there is a command, or the engine closes, or timeout_s is over."""
        with self._changed:
            if not (self._commands or self._queued or self._is_closed):
                self._changed.wait(timeout_s)

    def forget(self, groups: Iterable[Group]) -> None:
        """Drops requests that have ended."""
        with self._changed:
            for group in groups:
                # Who has read its end may have given another its id already.
                if self._groups.get(group.stream.request_id) is group:
                    del self._groups[group.stream.request_id]
            self._changed.notify_all()

    def _open(self, request_id: str) -> Group | None:
        group = self._groups.get(request_id)
        return None if group is None or group.stream.is_complete else group

    def _check_unused(self, request_id: str) -> None:
        if self._open(request_id) is not None:
            raise RequestError(
                f"request_id: got {request_id!r}, which is in flight; each must differ; leave it"
                " out, and one is drawn",
                field="request_id",
            )

    def _enqueue(self, group: Group) -> None:
        self._groups[group.stream.request_id] = group
        self._queued.append(group)
        self._changed.notify_all()


def _new_id() -> str:
    return secrets.token_hex(8)
