"""Who runs in the next step, how many tokens each computes, and in which pages.

Decisions rest on counts only, never on token values: a step is planned while the one before is
still on the device. Token ids are appended by `commit`, one step late; a stop is therefore seen
when a further token is already being computed, and that token is dropped.
"""

import heapq
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from pallasite.engine.page_pool import PagePool
from pallasite.engine.sequence import Sequence, State


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence's part of a step.

    Attributes:
        start: the position of the first token that is computed.
        num_tokens: how many are.
        samples: whether a token is sampled after the last.
        takes_previous: whether the token fed is the slot's last sample, which the host may not have
            seen yet.
    """

    sequence: Sequence
    slot: int
    start: int
    num_tokens: int
    samples: bool
    takes_previous: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step: rows with a single token first, and the sequences that were just given a slot."""

    rows: list[Row]
    admitted: list[Sequence]
    num_decode: int

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


def make_plan(rows: list[Row], admitted: list[Sequence]) -> Plan | None:
    """Orders the rows of a step; None where there are none."""
    if not rows:
        return None
    num_decode = sum(row.num_tokens == 1 for row in rows)
    ordered = sorted(rows, key=lambda row: row.num_tokens > 1)
    return Plan(rows=ordered, admitted=admitted, num_decode=num_decode)


class Scheduler:
    """Continuous batching with chunked prefill under a token budget, over one pool of pages."""

    def __init__(
        self, pool: PagePool, page_size: int, num_slots: int, max_batch_tokens: int
    ) -> None:
        self.pool = pool
        self.num_preemptions = 0
        self._page_size = page_size
        self._max_batch_tokens = max_batch_tokens
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._deadlines: list[tuple[float, int, int, Sequence]] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def sequences(self) -> Iterator[Sequence]:
        """Yields every sequence that runs or waits."""
        yield from self._running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; one that was held keeps its pages."""
        self._enqueue(sequence)
        if sequence.deadline_s is not None:
            entry = (sequence.deadline_s, sequence.group.arrival, sequence.index, sequence)
            heapq.heappush(self._deadlines, entry)
            if len(self._deadlines) > 2 * (len(self._running) + len(self._waiting)) + 64:
                self._drop_ended_deadlines()

    def expired(self, now: float) -> list[Sequence]:
        """Returns the unfinished sequences whose deadline has passed, each once."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, *_, sequence = heapq.heappop(self._deadlines)
            is_open = sequence.state in (State.WAITING, State.RUNNING)
            if is_open and sequence.deadline_s == deadline:
                late.append(sequence)
        return late

    def _drop_ended_deadlines(self) -> None:
        # An ended sequence would stay in memory until its deadline, which may be days away.
        is_open = (State.WAITING, State.RUNNING)
        self._deadlines = [entry for entry in self._deadlines if entry[-1].state in is_open]
        heapq.heapify(self._deadlines)

    def retire(self, sequence: Sequence) -> None:
        """Ends a sequence: the one place where slots and pages come back for good."""
        self._leave(sequence)
        self._release_pages(sequence)
        sequence.state = State.FINISHED

    def hold(self, sequence: Sequence) -> None:
        """Parks a sequence: its slot comes back, its pages stay."""
        self._leave(sequence)
        sequence.state = State.HELD

    def forget_pages(self) -> None:
        """Gives back what waiting sequences hold, since the cache was lost."""
        for sequence in self._waiting:
            self._forget(sequence)

    def schedule(self, now: float) -> Plan | None:
        """Plans the next step, or returns None where there is nothing to compute."""
        self._make_room_for_urgent()
        ready = sorted((s for s in self._running if not s.is_saturated), key=attrgetter("rank"))
        num_single = sum(s.num_tokens - s.num_computed == 1 for s in ready)
        budget = self._max_batch_tokens - num_single
        rows: list[Row] = []
        for sequence in ready:
            if sequence.state is not State.RUNNING:
                continue  # preempted for one of better rank, a moment ago
            remaining = sequence.num_tokens - sequence.num_computed
            count = 1 if remaining == 1 else min(remaining, budget)
            if count < 1 or not self._extend(sequence, count):
                continue
            budget -= count if remaining > 1 else 0
            rows.append(self._row(sequence, count))
        admitted = self._admit(rows, budget, now)
        return make_plan(rows, admitted)

    def _row(self, sequence: Sequence, count: int) -> Row:
        start = sequence.num_computed
        samples = start + count == sequence.num_tokens
        row = Row(
            sequence=sequence,
            slot=sequence.slot,
            start=start,
            num_tokens=count,
            samples=samples,
            takes_previous=start >= sequence.num_admitted,
        )
        sequence.num_computed += count
        sequence.num_sampled += samples
        return row

    def _admit(self, rows: list[Row], budget: int, now: float) -> list[Sequence]:
        admitted: list[Sequence] = []
        for sequence in list(self._waiting):
            if not self._free_slots or budget < 1:
                break
            if sequence.num_in_flight:
                break  # preempted a moment ago; its last token arrives with the next commit
            if self._awaits_sibling(sequence):
                continue
            self._share_prompt(sequence)
            if not self._find_room(sequence):
                break
            self._waiting.remove(sequence)
            sequence.slot = self._free_slots.pop()
            sequence.state = State.RUNNING
            sequence.num_admitted = sequence.num_tokens
            if sequence.scheduled_s is None:
                sequence.scheduled_s = now
            self._running.append(sequence)
            admitted.append(sequence)
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            budget -= count
            rows.append(self._row(sequence, count))
        return admitted

    def _find_room(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence pages for all its tokens.

        Where nothing runs, no page would ever come back by itself: waiting sequences of worse rank
        that hold some, resumed from a lease, lose them.
        """
        while not self._extend_if_free(sequence, sequence.num_tokens - sequence.num_computed):
            others = (s for s in reversed(self._waiting) if s.pages and s is not sequence)
            holder = None if self._running else next(others, None)
            if holder is None:
                return False
            self._forget(holder)
        return True

    def _awaits_sibling(self, sequence: Sequence) -> bool:
        """Whether a sibling is about to finish computing a prompt that this one can share."""
        return self._num_shareable(sequence) > 0 and any(
            s.state is State.RUNNING and (s.num_computed < s.num_prompt or sequence.needs_scores)
            for s in sequence.group.sequences
        )

    def _share_prompt(self, sequence: Sequence) -> None:
        """Takes over whole pages of the prompt from a sibling that has computed it."""
        if sequence.num_computed or sequence.needs_scores:
            return
        count = self._num_shareable(sequence)
        for sibling in sequence.group.sequences:
            if sibling.state is State.RUNNING and sibling.num_computed >= sibling.num_prompt:
                sequence.pages = self.pool.share(sibling.pages[:count])
                sequence.num_computed = count * self._page_size
                sequence.num_cached = max(sequence.num_cached, sequence.num_computed)
                return

    def _num_shareable(self, sequence: Sequence) -> int:
        # At least one prompt token is computed by each, for the logits of its first sample.
        return (sequence.num_prompt - 1) // self._page_size

    def _make_room_for_urgent(self) -> None:
        """Preempts for a waiting sequence of strictly better priority, worst first."""
        for head in self._waiting:
            if head.num_in_flight or self._awaits_sibling(head):
                continue
            missing = self._num_missing(head, head.num_tokens - head.num_computed)
            priority = head.request.priority
            worse = [s for s in self._running if s.request.priority > priority]
            if missing > self.pool.num_free + sum(len(s.pages) for s in worse):
                return  # leases hold too much; preempting would help nobody
            while self._running:
                worst = max(self._running, key=attrgetter("rank"))
                has_room = self._free_slots and missing <= self.pool.num_free
                if has_room or head.request.priority >= worst.request.priority:
                    return
                self._preempt(worst)
            return

    def _extend(self, sequence: Sequence, count: int) -> bool:
        """Gives a running sequence pages for `count` more tokens, at the cost of worse ranks."""
        while not self._extend_if_free(sequence, count):
            worst = max(self._running, key=attrgetter("rank"))
            if worst is not sequence:
                self._preempt(worst)
                continue
            holder = next((s for s in reversed(self._waiting) if s.pages), None)
            if holder is not None:
                self._forget(holder)
            elif len(self._running) > 1:
                self._preempt(sequence)
                return False
            else:
                return False  # leases hold the rest; it goes on when one ends
        return True

    def _extend_if_free(self, sequence: Sequence, count: int) -> bool:
        pages = self.pool.allocate(self._num_missing(sequence, count))
        if pages is None:
            return False
        sequence.pages.extend(pages)
        return True

    def _num_missing(self, sequence: Sequence, count: int) -> int:
        needed = -(-(sequence.num_computed + count) // self._page_size)
        return max(0, needed - len(sequence.pages))

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a running sequence back to wait; what it had computed is computed again."""
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        self._leave(sequence)
        self._forget(sequence)
        self._enqueue(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._release_pages(sequence)
        sequence.num_computed = 0

    def _release_pages(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        insort(self._waiting, sequence, key=attrgetter("rank"))

    def _leave(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self._free_slots.append(sequence.slot)
            sequence.slot = -1
        elif sequence.state is State.WAITING:
            self._waiting.remove(sequence)
