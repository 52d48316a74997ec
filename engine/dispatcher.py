"""Which data shard serves a request, and the step of all shards together.

Every shard has its own slots, its own pages and its own scheduler; all of them run the same program
in the same step. A request and the pages it fills are on one shard. One that waits without pages
may still go to another shard, so that no shard idles while requests queue for one beside it.
"""

import heapq
from collections.abc import Iterable, Iterator
from itertools import islice

from pallasite.engine.page_pool import PagePool
from pallasite.engine.plan import Plan, Row, make_plan
from pallasite.engine.scheduler import Forecast, Scheduler
from pallasite.engine.sequence import Group, Sequence, State


class Dispatcher:
    """Serves over all shards as a `Scheduler` does over one.

    Sizes are of all shards together, which have equal parts of them.
    """

    def __init__(
        self, num_shards: int, num_pages: int, page_size: int, num_slots: int, max_batch_tokens: int
    ) -> None:
        self.pools = [PagePool(num_pages // num_shards) for _ in range(num_shards)]
        self._shards = [
            Scheduler(pool, page_size, num_slots // num_shards, max_batch_tokens // num_shards)
            for pool in self.pools
        ]
        self._deadlines: list[tuple[float, int, int, Sequence]] = []

    @property
    def num_running(self) -> int:
        return sum(shard.num_running for shard in self._shards)

    @property
    def num_waiting(self) -> int:
        return sum(shard.num_waiting for shard in self._shards)

    @property
    def num_preemptions(self) -> int:
        return sum(shard.num_preemptions for shard in self._shards)

    @property
    def num_pages(self) -> int:
        return sum(pool.num_pages for pool in self.pools)

    @property
    def num_free_pages(self) -> int:
        return sum(pool.num_free for pool in self.pools)

    def sequences(self) -> Iterator[Sequence]:
        """Yields every sequence that runs or waits."""
        for shard in self._shards:
            yield from shard.sequences()

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence, on the shard of its siblings or of its pages where it has some."""
        if sequence.shard < 0:
            shard = self._least_loaded(self._open_to(sequence))
            for sibling in sequence.group.sequences:
                sibling.shard = shard
        self._shards[sequence.shard].add(sequence)
        if sequence.deadline_s is not None:
            entry = (sequence.deadline_s, sequence.group.arrival, sequence.index, sequence)
            heapq.heappush(self._deadlines, entry)
            if len(self._deadlines) > 2 * (self.num_running + self.num_waiting) + 64:
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
        """Ends a sequence: its slot and its pages come back for good."""
        self._shards[sequence.shard].retire(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Parks a sequence: its slot comes back, its pages stay."""
        self._shards[sequence.shard].hold(sequence)

    def with_draft(self, row: Row, draft: tuple[int, ...]) -> Row:
        """Returns a planned row that verifies a draft, too, as far as there are free pages."""
        return self._shards[row.sequence.shard].with_draft(row, draft)

    def go_on(self, plan: Plan, num_more: int) -> bool:
        """Has each row of a plan sample so many more tokens; whether there are pages for them."""
        parts = list(zip(self._shards, plan.parts, strict=True))
        if not all(shard.can_go_on(part.rows, num_more) for shard, part in parts):
            return False
        for shard, part in parts:
            shard.go_on(part.rows, num_more)
        return True

    def settle(self, sequence: Sequence, num_accepted: int) -> None:
        """Takes in how many tokens of a draft were right; none of them is in flight any more."""
        self._shards[sequence.shard].settle(sequence, num_accepted)

    def forget_pages(self) -> None:
        """Gives back what waiting sequences hold, since the cache was lost."""
        for shard in self._shards:
            shard.forget_pages()

    def schedule(self, now: float) -> Plan | None:
        """Plans the next step, or returns None where there is nothing to compute."""
        if len(self._shards) > 1 and self.num_waiting:
            self._spread()
        return make_plan([shard.schedule(now) for shard in self._shards])

    def _spread(self) -> None:
        """Moves requests that cannot start where they wait to shards where they can.

        This ends: nothing moves but to start, and only worse ranks may have to wait for it.
        """
        forecasts = [shard.forecast() for shard in self._shards]
        while (move := self._find_move(forecasts)) is not None:
            group, target = move
            waiting = _waiting(group)
            source = waiting[0].shard
            for sequence in waiting:
                self._shards[source].withdraw(sequence)
                sequence.shard = target
                self._shards[target].add(sequence)
            for shard in (source, target):
                forecasts[shard] = self._shards[shard].forecast()

    def _find_move(self, forecasts: list[Forecast]) -> tuple[Group, int] | None:
        """Returns a group and a better shard for it: of the longest queue, where priorities allow.

        Of a queue the best rank alone may go, for the others would be served before it. But they go
        too rather than that a shard idles.
        """
        has_idle = any(shard.num_running == shard.num_waiting == 0 for shard in self._shards)
        heads: list[Sequence] = []
        for forecast in forecasts:
            groups = islice(_at_rest(forecast.queue), None if has_idle else 1)
            heads += (_waiting(group)[0] for group in groups)
        num_waiting = [shard.num_waiting for shard in self._shards]
        for head in sorted(heads, key=lambda s: (s.request.priority, -num_waiting[s.shard])):
            target = self._best_for(head, forecasts)
            if target != head.shard:
                return head.group, target
        return None

    def _best_for(self, head: Sequence, forecasts: list[Forecast]) -> int:
        """Returns the shard where a sequence can start, or where it waits if there is none."""
        shards = self._open_to(head)
        fitting = [i for i in shards if forecasts[i].fits(head)]
        if fitting:
            return self._least_loaded(fitting)
        if forecasts[head.shard].has_place(head):
            return head.shard
        yielding = [i for i in shards if self._shards[i].yields_to(head)]
        return max(yielding, key=lambda i: self._shards[i].worst_rank, default=head.shard)

    def _open_to(self, sequence: Sequence) -> list[int]:
        """Returns the shards that may serve a sequence that holds no pages.

        One to be leased goes where leases then hold half of the pages at most, or where they hold
        the fewest: a prompt of more than half a shard alone leaves less than that for others.
        """
        shards = list(range(len(self._shards)))
        if sequence.lease_s is None:
            return shards
        leased = [shard.num_leased_pages for shard in self._shards]
        most = self.pools[0].num_pages // 2 - self._shards[0].prompt_pages(sequence)
        within = [i for i in shards if leased[i] <= most or i == sequence.shard]
        return within or [min(shards, key=leased.__getitem__)]

    def _least_loaded(self, shards: Iterable[int]) -> int:
        return min(shards, key=lambda i: self._shards[i].num_tokens)


def _at_rest(queue: Iterable[Sequence]) -> Iterator[Group]:
    """Yields the groups that wait whole in a queue: nothing runs, has pages or is in flight."""
    for sequence in queue:
        group = sequence.group
        is_whole = all(s.state in (State.WAITING, State.FINISHED) for s in group.sequences)
        waiting = _waiting(group)
        has_any = any(s.pages or s.num_in_flight for s in waiting)
        if is_whole and not has_any and sequence is waiting[0]:
            yield group


def _waiting(group: Group) -> list[Sequence]:
    return [sequence for sequence in group.sequences if sequence.state is State.WAITING]
