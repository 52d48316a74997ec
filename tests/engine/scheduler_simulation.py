"""Dispatcher, schedulers and committer driven without a device, the rules checked at every step.

A model of the cache notes which token of which sequence each place of each page of each shard
holds, so that a page given away too early, shared wrongly, sought on another shard or forgotten is
seen by the one who reads it. As in the engine, a step is planned before the one ahead of it is
committed.
"""

from collections.abc import Iterable

import numpy as np

from pallasite.engine.audit import audit
from pallasite.engine.commit import Committer
from pallasite.engine.dispatcher import Dispatcher
from pallasite.engine.plan import Part, Plan, Row
from pallasite.engine.request import FinishReason, KvHandle, Request, SamplingParams
from pallasite.engine.sequence import Group, Sequence, State, new_group
from pallasite.engine.step import RESULT_WIDTH
from pallasite.engine.stream import TokenStream
from tests.engine.scheduler_scenes import EOS, PAGE, Job


class Simulation:
    """Runs jobs to their end; raises AssertionError where a rule is broken.

    The sizes are of all shards together, as the engine's are.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        num_slots: int,
        max_batch_tokens: int,
        num_shards: int = 1,
        make: type[Dispatcher] = Dispatcher,
    ) -> None:
        self.scheduler = make(num_shards, num_pages, PAGE, num_slots, max_batch_tokens)
        self.committer = Committer(self.scheduler, (EOS,), 10**9)
        self.num_shards = num_shards
        self.num_slots = num_slots // num_shards
        self.max_tokens = max_batch_tokens // num_shards
        self.plans: list[Plan] = []
        self.groups: list[Group] = []
        self.leased: dict[Sequence, int] = {}
        self.jobs: dict[Sequence, Job] = {}
        self.num_arrived = 0
        self.num_steps = 0
        self._previous: Plan | None = None
        self._in_step: Plan | None = None
        self._places: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        self._last_samples: dict[tuple[int, int], tuple[Sequence, int]] = {}
        self._origins: dict[Sequence, int] = {}
        self._holders: dict[Sequence, int] = {}

    def add(self, job: Job) -> Group:
        """Admits a job's request now."""
        request = Request(
            prompt_ids=(0,) * job.prompt_len,
            params=SamplingParams(max_tokens=job.max_tokens, n=job.n),
            priority=job.priority,
        )
        lease_s = None if job.lease is None or not self._may_lease(job.prompt_len) else 1.0
        stream = TokenStream(str(self.num_arrived), job.n)
        group = new_group(request, stream, self.num_arrived, lease_s)
        self.num_arrived += 1
        self.groups.append(group)
        for sequence in group.sequences:
            self.jobs[sequence] = job
            self._origins[sequence] = group.arrival
            self.scheduler.add(sequence)
        return group

    def add_each(self, *jobs: Job) -> list[Sequence]:
        """Admits jobs in order; returns the first sequence of each."""
        return [self.add(job).sequences[0] for job in jobs]

    def run(self, jobs: Iterable[Job] = ()) -> None:
        """Runs jobs, each from its step on, until every sequence has ended."""
        waiting = sorted(jobs, key=lambda job: job.arrives)
        most_steps = self.num_steps + self._most_steps([*self.jobs.values(), *waiting])
        while waiting or self._open():
            while waiting and waiting[0].arrives <= self.num_steps:
                self.add(waiting.pop(0))
            self.run_one()
            assert self.num_steps <= most_steps, "no end in sight"

    def run_one(self) -> Plan | None:
        """Resumes and aborts what is due, then steps."""
        self._resume()
        for sequence in self._open():
            job = self.jobs[sequence]
            is_open = sequence.state in (State.WAITING, State.RUNNING)
            if is_open and job.aborts_after == self.num_steps - job.arrives:
                self.abort(sequence)
        return self.step()

    def step(self) -> Plan | None:
        """Plans a step, checks it, and commits the one before it."""
        running = self.running()
        waiting = {s.group for s in (self.waiting() if self._idle_shards() else ())}
        could_move = set(filter(_is_at_rest, waiting))
        num_preemptions = self.scheduler.num_preemptions
        plan = self._plan()
        parts = [] if plan is None else plan.parts
        self._in_step = plan
        if plan is not None:
            self._check_plan(plan)
            self._compute(plan)
            self.plans.append(plan)
        self._check_preemptions(running, self.scheduler.num_preemptions - num_preemptions)
        for part in parts:
            self._check_order(part)
        self._check_places()
        self._check_pages()
        self._check_idleness(could_move)
        self._commit_previous()
        self._previous = plan
        self.num_steps += 1
        return plan

    def _plan(self) -> Plan | None:
        return self.scheduler.schedule(0.0)

    def waiting(self) -> list[Sequence]:
        return [s for s in self.jobs if s.state is State.WAITING]

    def running(self) -> set[Sequence]:
        return {s for s in self.jobs if s.state is State.RUNNING}

    def num_cached(self, shard: int) -> int:
        """The tokens that a shard's sequences have in its pages."""
        return sum(s.num_computed for s in self._open() if s.shard == shard)

    def abort(self, sequence: Sequence) -> None:
        self.committer.end(sequence, sequence.finish(FinishReason.ABORT, 0.0))

    def end_leases(self) -> None:
        """What the engine does when all have expired."""
        for sequence in self.leased:
            self.scheduler.retire(sequence)
        self.leased.clear()

    def lose_cache(self) -> None:
        """What the engine does after a step that failed."""
        self._previous = None
        for sequence in list(self.scheduler.sequences()):
            if sequence.state is State.RUNNING or sequence.num_in_flight:
                self.abort(sequence)
        self.scheduler.forget_pages()
        self.end_leases()
        self._holders.clear()
        self._places.clear()

    def _may_lease(self, prompt_len: int) -> bool:
        """The engine's rule: half of all pages at most, or a single one more."""
        leases = [s for s in self._open() if s.lease_s is not None]
        promised = sum(-(-s.num_prompt // PAGE) for s in leases)
        wanted = promised + -(-prompt_len // PAGE)
        return promised == 0 or wanted <= self.scheduler.num_pages // 2

    def _most_steps(self, jobs: list[Job]) -> int:
        # Each sequence alone, a token a step, twice over for what is preempted and resumed.
        each = [job.n * (2 * (job.prompt_len + job.max_tokens) + 8) for job in jobs]
        waits = [job.arrives + (job.lease or 0) for job in jobs]
        return sum(each) + max(waits, default=0)

    def _open(self) -> list[Sequence]:
        return [s for s in self.jobs if s.state is not State.FINISHED]

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
        assert len(plan.parts) == self.num_shards
        assert plan.rows == [row for part in plan.parts for row in part.rows] != []
        assert plan.num_tokens == sum(row.num_tokens for row in plan.rows)
        assert len({row.sequence for row in plan.rows}) == len(plan.rows)
        assert plan.admitted == [s for part in plan.parts for s in part.admitted]
        assert plan.most_rows == max(len(part.rows) for part in plan.parts)
        assert plan.most_tokens == max(part.num_tokens for part in plan.parts)
        assert plan.has_prefill == any(row.num_tokens - len(row.draft) > 1 for row in plan.rows)
        assert plan.has_drafts == any(row.draft for row in plan.rows)
        for shard, part in enumerate(plan.parts):
            self._check_part(part, shard)

    def _check_part(self, part: Part, shard: int) -> None:
        rows = part.rows
        assert len(rows) <= self.num_slots
        assert part.num_tokens == sum(row.num_tokens for row in rows) <= self.max_tokens
        assert [row.num_tokens == 1 for row in rows] == [True] * part.num_decode + [False] * (
            len(rows) - part.num_decode
        ), "single tokens first"
        assert len({row.slot for row in rows}) == len(rows)
        for row in rows:
            sequence = row.sequence
            assert row.num_tokens >= 1
            assert sequence.state is State.RUNNING
            assert sequence.shard == shard
            assert row.slot == sequence.slot
            assert 0 <= row.slot < self.num_slots
            assert sequence.num_computed == row.certain_end
            assert row.certain_end == row.start + row.num_tokens - len(row.draft)
            assert row.samples or not row.draft
            assert row.samples == (sequence.num_computed == sequence.num_tokens - row.samples)
            most = sequence.num_sampled + len(row.draft)
            assert most <= sequence.request.params.max_tokens

    def _compute(self, plan: Plan) -> None:
        """What the device does: all tokens are written, then all that is visible is read."""
        written: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        for shard, part in enumerate(plan.parts):
            for row in part.rows:
                sequence, end = row.sequence, row.start + row.num_tokens
                if row.takes_previous:
                    assert row.certain_end == row.start + 1
                    assert self._last_samples[shard, row.slot] == (sequence, row.start)
                else:
                    known = len(sequence.token_ids)
                    assert known >= row.certain_end, "the host knows what it feeds"
                for position in range(row.start, end):
                    place = shard, sequence.pages[position // PAGE], position % PAGE
                    assert place not in written
                    written[place] = self._key(sequence, position)
                    if position >= row.certain_end + self._num_right(row):
                        written[place] = (-1, -1, position)  # of a token that never was
                if row.samples:
                    end = row.certain_end + self._num_right(row)
                    self._last_samples[shard, row.slot] = (sequence, end)
        self._places |= written
        for sequence in self._open():
            for position in range(sequence.num_computed):
                place = sequence.shard, sequence.pages[position // PAGE], position % PAGE
                assert self._places.get(place) == self._key(sequence, position)

    def _key(self, sequence: Sequence, position: int) -> tuple[int, int, int]:
        is_own = position >= sequence.num_prompt
        return (self._origins[sequence], sequence.index if is_own else -1, position)

    def _check_preemptions(self, ran: set[Sequence], count: int) -> None:
        preempted = {s for s in ran if s.state is State.WAITING}
        assert len(preempted) <= count
        for shard in range(self.num_shards):
            best_preempted = min((s.rank for s in preempted if s.shard == shard), default=None)
            for sequence in self.running() & ran:
                if sequence.shard == shard:
                    assert best_preempted is None or sequence.rank < best_preempted

    def _check_order(self, part: Part) -> None:
        """Nobody is admitted before one of better rank, but for siblings that wait for a prompt."""
        admitted = part.admitted
        assert admitted == sorted(admitted, key=lambda s: s.rank)
        for sequence in self.waiting() if admitted else ():
            is_here = sequence.shard == admitted[-1].shard
            if is_here and sequence.rank < admitted[-1].rank:
                assert any(s.num_computed for s in sequence.group.sequences if s is not sequence)

    def _check_places(self) -> None:
        """All of a request is on one shard, and what holds pages stays where they are."""
        for group in self.groups:
            assert len({s.shard for s in group.sequences if s.state is not State.FINISHED}) <= 1
        for sequence in self._open():
            shard = self._holders.get(sequence, sequence.shard)
            assert sequence.shard == shard
            assert 0 <= shard < self.num_shards
        self._holders = {s: s.shard for s in self._open() if s.pages}

    def _check_pages(self) -> None:
        owners = self._open()
        assert audit(self.scheduler.pools, owners, 0).problems == ()
        for shard, scheduler in enumerate(self.scheduler._shards):
            here = [s for s in owners if s.shard == shard]
            leases = [s for s in here if s.lease_s is not None]
            num_prompts = sum(len(s.request.prompt_ids) for s in here)
            assert scheduler.num_tokens == num_prompts + sum(s.num_sampled for s in here)
            num_leased = sum(-(-len(s.request.prompt_ids) // PAGE) for s in leases)
            assert scheduler.num_leased_pages == num_leased
        for sequence in self.running():
            most = sequence.num_tokens + self._num_drafted(sequence) + PAGE
            assert len(sequence.pages) * PAGE < most, "pages kept for nothing"

    def _check_idleness(self, could_move: set[Group]) -> None:
        """No shard has nobody while a request waits elsewhere that could start there.

        `could_move` are those that had no pages when the step was planned.
        """
        for shard in self._idle_shards():
            pool, scheduler = self.scheduler.pools[shard], self.scheduler._shards[shard]
            for group in filter(_is_at_rest, could_move):
                waiting = (s for s in group.sequences if s.state is State.WAITING)
                if (first := next(waiting, None)) is None:
                    continue
                leased = scheduler.num_leased_pages + -(-first.num_prompt // PAGE)
                may_go = first.lease_s is None or leased <= pool.num_pages // 2
                assert not may_go or -(-first.num_tokens // PAGE) > pool.num_free

    def _idle_shards(self) -> set[int]:
        is_busy = (State.WAITING, State.RUNNING)
        return set(range(self.num_shards)) - {s.shard for s in self.jobs if s.state in is_busy}

    def _commit_previous(self) -> None:
        plan, self._previous = self._previous, None
        if plan is None:
            return
        results = np.zeros((self.num_shards, self.max_tokens, RESULT_WIDTH), np.int32)
        for part, words in zip(plan.parts, results, strict=True):
            place = 0
            for row in part.rows:
                for end in range(row.certain_end, row.certain_end + len(row.draft) + 1):
                    words[place, 0] = self._sampled(row.sequence, end)
                    place += 1
                place += row.certain_end - row.start - 1 if plan.has_drafts else 0
        self.committer.commit(plan, results, None, self._grant)

    def _sampled(self, sequence: Sequence, end: int) -> int:
        """What the model says after that many tokens."""
        place = end - sequence.num_prompt + 1
        return EOS if place == self.jobs[sequence].stops_after else EOS + 1 + place

    def _num_right(self, row: Row) -> int:
        """How many tokens of a draft come before the first wrong one."""
        for place, token_id in enumerate(row.draft):
            if token_id != self._sampled(row.sequence, row.certain_end + place):
                return place
        return len(row.draft)

    def _num_drafted(self, sequence: Sequence) -> int:
        rows = [] if self._in_step is None else self._in_step.rows
        return max((len(row.draft) for row in rows if row.sequence is sequence), default=0)

    def _grant(self, sequence: Sequence, lease_s: float) -> KvHandle:
        self.leased[sequence] = self.num_steps
        return KvHandle(handle_id="0" * 32, epoch="e", expires_in_s=lease_s)


def simulation_of(
    num_shards: int, *, num_slots: int = 2, num_pages: int = 64, max_batch_tokens: int = 100
) -> Simulation:
    """Makes one of shards of this size each."""
    return Simulation(
        num_shards=num_shards,
        num_pages=num_shards * num_pages,
        num_slots=num_shards * num_slots,
        max_batch_tokens=num_shards * max_batch_tokens,
    )


def _is_at_rest(group: Group) -> bool:
    """Whether nothing of a request runs, holds pages or is on its way to the host."""
    return all(
        s.state is State.FINISHED
        or (s.state is State.WAITING and not s.pages and not s.num_in_flight)
        for s in group.sequences
    )
