"""The scheduler and the committer driven without a device, and the rules checked at every step.

A model of the cache notes which token of which sequence each place of each page holds, so that a
page given away too early, shared wrongly or forgotten is seen by the one who reads it. As in the
engine, a step is planned before the one ahead of it is committed.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pallasite.engine.audit import audit
from pallasite.engine.commit import Committer
from pallasite.engine.page_pool import PagePool
from pallasite.engine.request import FinishReason, KvHandle, Request, SamplingParams
from pallasite.engine.scheduler import Plan, Scheduler
from pallasite.engine.sequence import Group, Sequence, State, new_group
from pallasite.engine.step import RESULT_WIDTH
from pallasite.engine.stream import TokenStream

PAGE = 4
EOS = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request, when it comes, and when it ends by itself or by its caller, in steps or tokens.

    `lease` is None, or the steps from its first token to its decode.
    """

    prompt_len: int
    max_tokens: int
    n: int = 1
    priority: int = 0
    arrives: int = 0
    stops_after: int | None = None
    aborts_after: int | None = None
    lease: int | None = None


class Simulation:
    """Runs jobs to their end; raises AssertionError where a rule is broken."""

    def __init__(self, *, num_pages: int, num_slots: int, max_batch_tokens: int) -> None:
        self.pool = PagePool(num_pages)
        self.scheduler = Scheduler(self.pool, PAGE, num_slots, max_batch_tokens)
        self.committer = Committer(self.scheduler, (EOS,), 10**9)
        self.num_slots = num_slots
        self.max_batch_tokens = max_batch_tokens
        self.plans: list[Plan] = []
        self.groups: list[Group] = []
        self.leased: dict[Sequence, int] = {}
        self.jobs: dict[Sequence, Job] = {}
        self.num_arrived = 0
        self.num_steps = 0
        self._previous: Plan | None = None
        self._places: dict[tuple[int, int], tuple[int, int, int]] = {}
        self._last_samples: dict[int, tuple[Sequence, int]] = {}
        self._origins: dict[Sequence, int] = {}

    def add(self, job: Job) -> Group:
        """Admits a job's request now."""
        request = Request(
            prompt_ids=(0,) * job.prompt_len,
            params=SamplingParams(max_tokens=job.max_tokens, n=job.n),
            priority=job.priority,
        )
        holds_much = sum(len(s.pages) for s in self.leased) > self.pool.num_pages // 2
        lease_s = None if job.lease is None or holds_much else 1.0
        stream = TokenStream(str(self.num_arrived), job.n)
        group = new_group(request, stream, self.num_arrived, lease_s)
        self.num_arrived += 1
        self.groups.append(group)
        for sequence in group.sequences:
            self.jobs[sequence] = job
            self._origins[sequence] = group.arrival
            self.scheduler.add(sequence)
        return group

    def run(self, jobs: Iterable[Job] = ()) -> None:
        """Runs jobs, each from its step on, until every sequence has ended."""
        waiting = sorted(jobs, key=lambda job: job.arrives)
        most_steps = self.num_steps + self._most_steps([*self.jobs.values(), *waiting])
        while waiting or self._open():
            while waiting and waiting[0].arrives <= self.num_steps:
                self.add(waiting.pop(0))
            self._resume()
            for sequence in self._open():
                job = self.jobs[sequence]
                is_open = sequence.state in (State.WAITING, State.RUNNING)
                if is_open and job.aborts_after == self.num_steps - job.arrives:
                    self.abort(sequence)
            self.step()
            assert self.num_steps <= most_steps, "no end in sight"

    def step(self) -> Plan | None:
        """Plans a step, checks it, and commits the one before it."""
        running = self._running()
        num_preemptions = self.scheduler.num_preemptions
        plan = self.scheduler.schedule(0.0)
        if plan is not None:
            self._check_plan(plan)
            self._compute(plan)
            self.plans.append(plan)
        self._check_preemptions(running, self.scheduler.num_preemptions - num_preemptions)
        self._check_order(plan)
        self._check_pages()
        previous, self._previous = self._previous, plan
        if previous is not None:
            self._commit(previous)
        self.num_steps += 1
        return plan

    def abort(self, sequence: Sequence) -> None:
        self.committer.end(sequence, sequence.finish(FinishReason.ABORT, 0.0))

    def _most_steps(self, jobs: list[Job]) -> int:
        # Each sequence alone, a token a step, twice over for what is preempted and resumed.
        each = [job.n * (2 * (job.prompt_len + job.max_tokens) + 8) for job in jobs]
        waits = [job.arrives + (job.lease or 0) for job in jobs]
        return sum(each) + max(waits, default=0)

    def _open(self) -> list[Sequence]:
        return [s for s in self.jobs if s.state is not State.FINISHED]

    def _running(self) -> set[Sequence]:
        return {s for s in self.jobs if s.state is State.RUNNING}

    def _resume(self) -> None:
        for sequence, granted in list(self.leased.items()):
            if self.num_steps - granted < self.jobs[sequence].lease:
                continue
            del self.leased[sequence]
            old = sequence.group
            sequence.group = Group(
                request=old.request,
                stream=TokenStream("resumed"),
                submitted_s=0.0,
                arrival=self.num_arrived,
                sequences=[sequence],
            )
            self.num_arrived += 1
            self.groups.append(sequence.group)
            sequence.lease_s = None
            self.scheduler.add(sequence)

    def _check_plan(self, plan: Plan) -> None:
        rows = plan.rows
        assert 0 < len(rows) <= self.num_slots
        assert plan.num_tokens == sum(row.num_tokens for row in rows) <= self.max_batch_tokens
        assert [row.num_tokens == 1 for row in rows] == [True] * plan.num_decode + [False] * (
            len(rows) - plan.num_decode
        ), "single tokens first"
        assert len({row.sequence for row in rows}) == len(rows)
        assert len({row.slot for row in rows}) == len(rows)
        for row in rows:
            sequence = row.sequence
            assert row.num_tokens >= 1
            assert sequence.state is State.RUNNING
            assert row.slot == sequence.slot
            assert 0 <= row.slot < self.num_slots
            assert sequence.num_computed == row.start + row.num_tokens
            assert row.samples == (sequence.num_computed == sequence.num_tokens - row.samples)
            assert sequence.num_sampled <= sequence.request.params.max_tokens

    def _compute(self, plan: Plan) -> None:
        """What the device does: all tokens are written, then all that is visible is read."""
        written: dict[tuple[int, int], tuple[int, int, int]] = {}
        for row in plan.rows:
            sequence, end = row.sequence, row.start + row.num_tokens
            if row.takes_previous:
                assert row.num_tokens == 1
                assert self._last_samples[row.slot] == (sequence, row.start)
            else:
                assert len(sequence.token_ids) >= end, "the host knows what it feeds"
            for position in range(row.start, end):
                place = sequence.pages[position // PAGE], position % PAGE
                assert place not in written
                written[place] = self._key(sequence, position)
        self._places |= written
        for row in plan.rows:
            if row.samples:
                self._last_samples[row.slot] = (row.sequence, row.start + row.num_tokens)
        for sequence in self._open():
            for position in range(sequence.num_computed):
                place = sequence.pages[position // PAGE], position % PAGE
                assert self._places.get(place) == self._key(sequence, position)

    def _key(self, sequence: Sequence, position: int) -> tuple[int, int, int]:
        is_own = position >= sequence.num_prompt
        return (self._origins[sequence], sequence.index if is_own else -1, position)

    def _check_preemptions(self, ran: set[Sequence], count: int) -> None:
        preempted = {s for s in ran if s.state is State.WAITING}
        assert len(preempted) <= count
        best_preempted = min((s.rank for s in preempted), default=None)
        for sequence in self._running() & ran:
            assert best_preempted is None or sequence.rank < best_preempted

    def _check_order(self, plan: Plan | None) -> None:
        """Nobody is admitted before one of better rank, but for siblings that wait for a prompt."""
        admitted = [] if plan is None else plan.admitted
        assert admitted == sorted(admitted, key=lambda s: s.rank)
        for sequence in self._open() if admitted else ():
            if sequence.state is State.WAITING and sequence.rank < admitted[-1].rank:
                assert any(s.num_computed for s in sequence.group.sequences if s is not sequence)

    def _check_pages(self) -> None:
        owners = self._open()
        assert audit(self.pool, owners, 0).problems == ()
        needed = Counter(s.state for s in owners if s.pages)
        assert State.FINISHED not in needed
        for sequence in self._running():
            assert len(sequence.pages) * PAGE < sequence.num_tokens + PAGE, "pages kept for nothing"

    def _commit(self, plan: Plan) -> None:
        results = np.zeros((len(plan.rows), RESULT_WIDTH), np.int32)
        for row, words in zip(plan.rows, results, strict=True):
            stops_after = self.jobs[row.sequence].stops_after
            place = row.start + row.num_tokens - row.sequence.num_prompt + 1
            words[0] = EOS if place == stops_after else EOS + 1 + place
        self.committer.commit(plan, results, None, self._grant)

    def _grant(self, sequence: Sequence, lease_s: float) -> KvHandle:
        self.leased[sequence] = self.num_steps
        return KvHandle(handle_id="0" * 32, epoch="e", expires_in_s=lease_s)
