"""Who runs in a shard's next step, how many tokens each computes, and in which pages.

A scheduler knows one shard; `engine/dispatcher.py` has one for each. Decisions rest on counts only,
never on token values: a step is planned while the one before is still on the device. Token ids are
appended by `commit`, one step late; a stop is therefore seen when a further token is already being
computed, and that token is dropped.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter

from pallasite.engine.page_pool import PagePool
from pallasite.engine.plan import Part, Row, make_part
from pallasite.engine.sequence import Sequence, State


@dataclass(kw_only=True)
class Forecast:
    """What a shard's next step leaves for sequences that wait; less than nothing where it lacks.

    Attributes:
        queue: those that will still wait, best rank first.
    """

    num_slots: int
    num_pages: int
    num_tokens: int
    page_size: int
    queue: list[Sequence] = field(default_factory=list)

    def fits(self, sequence: Sequence) -> bool:
        """Whether the sequence could start, after all that are here."""
        return not self.queue and self.num_tokens > 0 and self.has_place(sequence)

    def has_place(self, sequence: Sequence) -> bool:
        """Whether there are a slot and pages for it, if not the time."""
        return self.num_slots > 0 and self._num_missing(sequence) <= self.num_pages

    def take(self, sequence: Sequence) -> None:
        """Sets aside what the sequence needs."""
        self.num_slots -= sequence.state is State.WAITING
        self.num_pages -= self._num_missing(sequence)
        self.num_tokens -= sequence.num_tokens - sequence.num_computed

    def _num_missing(self, sequence: Sequence) -> int:
        return max(0, -(-sequence.num_tokens // self.page_size) - len(sequence.pages))


class Scheduler:
    """Continuous batching with chunked prefill under a token budget, over one pool of pages.

    Attributes:
        num_tokens: tokens that its pages hold, or will, for all that run, wait or are held.
        num_leased_pages: pages of prompts that are leased, or will be.
    """

    def __init__(
        self, pool: PagePool, page_size: int, num_slots: int, max_batch_tokens: int
    ) -> None:
        self.pool = pool
        self.num_preemptions = 0
        self.num_tokens = 0
        self.num_leased_pages = 0
        self._page_size = page_size
        self._max_batch_tokens = max_batch_tokens
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def prompt_pages(self, sequence: Sequence) -> int:
        """Returns the pages that a sequence's prompt fills: what it holds while it is leased."""
        return -(-sequence.num_prompt // self._page_size)

    def sequences(self) -> Iterator[Sequence]:
        """Yields every sequence that runs or waits."""
        yield from self._running
        yield from self._waiting

    @property
    def worst_rank(self) -> tuple[int, int, int]:
        """The rank of the running sequence that is preempted first. There must be one."""
        return max(sequence.rank for sequence in self._running)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; one that was held keeps its pages."""
        if sequence.state is State.HELD:
            self.num_leased_pages -= self.prompt_pages(sequence)
        else:
            self._count(sequence, 1)
        self._enqueue(sequence)

    def withdraw(self, sequence: Sequence) -> None:
        """Takes a sequence out of the queue that holds no pages, for another shard to add."""
        self._leave(sequence)
        self._count(sequence, -1)

    def retire(self, sequence: Sequence) -> None:
        """Ends a sequence: the one place where slots and pages come back for good."""
        self._leave(sequence)
        self._release_pages(sequence)
        self._count(sequence, -1)
        sequence.state = State.FINISHED

    def _count(self, sequence: Sequence, sign: int) -> None:
        self.num_tokens += sign * sequence.num_tokens
        if sequence.lease_s is not None:
            self.num_leased_pages += sign * self.prompt_pages(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Parks a sequence: its slot comes back, its pages stay."""
        self._leave(sequence)
        sequence.state = State.HELD

    def forget_pages(self) -> None:
        """Gives back what waiting sequences hold, since the cache was lost."""
        for sequence in self._waiting:
            self._forget(sequence)

    def forecast(self) -> Forecast:
        """Foresees the next step.

        There may be more room than that: siblings are counted as if they shared nothing, and those
        that run as if none were about to end.
        """
        forecast = Forecast(
            num_slots=len(self._free_slots),
            num_pages=self.pool.num_free,
            num_tokens=self._max_batch_tokens,
            page_size=self._page_size,
        )
        for sequence in self._running:
            forecast.take(sequence)
        for index, sequence in enumerate(self._waiting):
            if not forecast.fits(sequence):
                forecast.queue = self._waiting[index:]
                break
            forecast.take(sequence)
        return forecast

    def yields_to(self, sequence: Sequence) -> bool:
        """Whether preempting worse priorities would let a sequence start that waits, or would."""
        if self._waiting and self._waiting[0].rank < sequence.rank:
            return False
        worse = self._worse_than(sequence)
        missing = self._num_missing(sequence, sequence.num_tokens - sequence.num_computed)
        return bool(worse) and missing <= self._num_reachable(worse)

    def schedule(self, now: float) -> Part:
        """Plans the next step's part, empty where there is nothing to compute."""
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
        return make_part(rows, admitted)

    def with_draft(self, row: Row, draft: tuple[int, ...]) -> Row:
        """Returns a row that verifies a draft, too, as far as there are free pages for it."""
        sequence = row.sequence
        if not self._extend_if_free(sequence, len(draft)):
            room = len(sequence.pages) * self._page_size - sequence.num_computed
            draft = draft[:room]
        return replace(row, num_tokens=row.num_tokens + len(draft), draft=draft)

    def can_go_on(self, rows: list[Row], num_more: int) -> bool:
        """Whether there are free pages for so many more tokens of each planned row."""
        num_missing = sum(self._num_missing(row.sequence, num_more) for row in rows)
        return num_missing <= self.pool.num_free

    def go_on(self, rows: list[Row], num_more: int) -> None:
        """Has planned rows sample so many more tokens, each from the one before it."""
        for row in rows:
            sequence = row.sequence
            is_extended = self._extend_if_free(sequence, num_more)
            assert is_extended, "can_go_on() comes first"
            sequence.num_computed += num_more
            sequence.num_sampled += num_more
            self.num_tokens += num_more

    def settle(self, sequence: Sequence, num_accepted: int) -> None:
        """Takes in how many tokens of a row's draft were right; pages of the others come back."""
        sequence.num_computed += num_accepted
        sequence.num_sampled += num_accepted
        self.num_tokens += num_accepted
        num_kept = -(-sequence.num_tokens // self._page_size)
        self.pool.release(sequence.pages[num_kept:])
        del sequence.pages[num_kept:]

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
        self.num_tokens += samples
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
            if missing > self._num_reachable(self._worse_than(head)):
                return  # leases hold too much; preempting would help nobody
            while self._running:
                worst = max(self._running, key=attrgetter("rank"))
                has_room = self._free_slots and missing <= self.pool.num_free
                if has_room or head.request.priority >= worst.request.priority:
                    return
                self._preempt(worst)
            return

    def _worse_than(self, sequence: Sequence) -> list[Sequence]:
        priority = sequence.request.priority
        return [s for s in self._running if s.request.priority > priority]

    def _num_reachable(self, preempted: list[Sequence]) -> int:
        """Returns the pages that would be free if these were preempted, at most."""
        return self.pool.num_free + sum(len(sequence.pages) for sequence in preempted)

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
