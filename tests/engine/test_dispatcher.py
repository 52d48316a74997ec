"""Several shards as one: where requests go, what moves, and each rule of a plan on every shard."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallasite.engine.dispatcher import Dispatcher
from pallasite.engine.plan import make_plan
from pallasite.engine.request import FinishReason
from pallasite.engine.sequence import State
from tests.engine.scheduler_simulation import PAGE, Job, Simulation, events_of, scenes


class OneScheduler(Dispatcher):
    """A scheduler alone, which places and moves nothing."""

    def add(self, sequence):
        sequence.shard = 0
        self._shards[0].add(sequence)

    def schedule(self, now):
        return make_plan([self._shards[0].schedule(now)])


def large(num_shards, *, num_slots=2, num_pages=64, max_batch_tokens=100):
    """Shards of this size each."""
    return Simulation(
        num_shards=num_shards,
        num_pages=num_shards * num_pages,
        num_slots=num_shards * num_slots,
        max_batch_tokens=num_shards * max_batch_tokens,
    )


def add(simulation, *jobs):
    """Admits jobs in order; returns the first sequence of each."""
    return [simulation.add(job).sequences[0] for job in jobs]


def check_that_all_ended(simulation):
    scheduler = simulation.scheduler
    assert scheduler.num_free_pages == scheduler.num_pages
    assert scheduler.num_running == scheduler.num_waiting == 0
    for sequence, job in simulation.jobs.items():
        expected = min(job.max_tokens, job.stops_after or job.max_tokens)
        assert sequence.state is State.FINISHED
        assert sequence.pages == []
        if job.aborts_after is None:
            assert sequence.num_completed == expected
        else:
            assert sequence.num_completed <= expected


@settings(max_examples=150)
@given(st.sampled_from((2, 4)).flatmap(scenes))
def test_every_sequence_ends_no_page_leaks_and_every_shard_keeps_the_rules(scene):
    sizes, jobs = scene
    simulation = Simulation(**sizes)
    simulation.run(jobs)
    check_that_all_ended(simulation)


@settings(max_examples=60)
@given(scenes())
def test_one_shard_is_served_as_its_scheduler_alone_would(scene):
    sizes, jobs = scene

    def trace(make):
        simulation = Simulation(make=make, **sizes)
        simulation.run(jobs)
        numbers = {sequence: number for number, sequence in enumerate(simulation.jobs)}
        rows = [
            (numbers[row.sequence], row.slot, row.start, row.num_tokens, row.takes_previous)
            for plan in simulation.plans
            for row in plan.rows
        ]
        admitted = [[numbers[s] for s in plan.admitted] for plan in simulation.plans]
        return rows, admitted, simulation.scheduler.num_preemptions, simulation.num_steps

    assert trace(Dispatcher) == trace(OneScheduler)


def test_a_request_goes_to_the_shard_of_the_fewest_tokens_and_its_siblings_with_it():
    simulation = large(2, num_slots=8)
    jobs = [Job(prompt_len=n, max_tokens=20) for n in (9, 12, 2, 2)]
    assert [s.shard for s in add(simulation, *jobs)] == [0, 1, 0, 0], "9, 12, then 11, then 13"
    group = simulation.add(Job(prompt_len=3, max_tokens=20, n=3))
    assert [s.shard for s in group.sequences] == [1, 1, 1], "12, and 21 after it"
    [after] = add(simulation, Job(prompt_len=1, max_tokens=1))
    assert after.shard == 0
    simulation.run()
    check_that_all_ended(simulation)


def test_tokens_that_were_sampled_and_leases_count_where_a_request_goes():
    simulation = large(2)
    leased, other = add(
        simulation,
        Job(prompt_len=10, max_tokens=5, lease=10),
        Job(prompt_len=7, max_tokens=30),
    )
    assert (leased.shard, other.shard) == (0, 1)
    for _ in range(3):
        simulation.step()
    assert leased.state is State.HELD
    assert (leased.num_tokens, other.num_tokens) == (11, 10)
    assert add(simulation, Job(prompt_len=5, max_tokens=1))[0].shard == 1
    simulation.run()
    assert [shard.num_tokens for shard in simulation.scheduler._shards] == [0, 0]


@given(
    num_shards=st.sampled_from((2, 3, 4)),
    num_slots=st.integers(1, 6),
    budget=st.integers(7, 60),
    count=st.integers(1, 40),
    prompt_len=st.integers(1, 20),
    max_tokens=st.integers(1, 9),
)
@settings(max_examples=40)
def test_equal_requests_fill_the_shards_evenly(
    num_shards, num_slots, budget, count, prompt_len, max_tokens
):
    simulation = large(num_shards, num_slots=num_slots, max_batch_tokens=budget)
    add(simulation, *[Job(prompt_len=prompt_len, max_tokens=max_tokens)] * count)
    most = prompt_len + max_tokens + PAGE
    while simulation.scheduler.num_running + simulation.scheduler.num_waiting:
        simulation.step()
        cached = [simulation.num_cached(shard) for shard in range(num_shards)]
        assert max(cached) - min(cached) <= most


def test_a_shard_without_a_queue_takes_the_best_rank_of_the_longest_one_and_starts_it_at_once():
    simulation = large(3, num_slots=1)
    first = add(
        simulation, *[Job(prompt_len=n, max_tokens=m) for n, m in ((30, 2), (5, 30), (5, 30))]
    )
    # Two wait on shard 1 and three on shard 2, while shard 0 has more tokens than any of them.
    queued = add(simulation, *[Job(prompt_len=n, max_tokens=9) for n in (3, 2, 3, 4, 4)])
    assert [s.shard for s in first] == [0, 1, 2]
    assert [s.shard for s in queued] == [1, 2, 2, 1, 2]
    while first[0].state is not State.FINISHED:
        simulation.step()
    plan = simulation.step()
    assert plan.admitted == [queued[1]]
    assert queued[1].shard == 0
    assert plan.parts[0].rows[0].sequence is queued[1]
    assert [s.shard for s in (queued[0], *queued[2:])] == [1, 2, 1, 2]
    simulation.run()
    check_that_all_ended(simulation)


def test_what_can_start_where_it_waits_stays_there():
    simulation = large(2, num_slots=2)
    sequences = add(simulation, *[Job(prompt_len=n, max_tokens=5) for n in (9, 2, 2)])
    assert [s.shard for s in sequences] == [0, 1, 1]
    simulation.step()
    assert [s.shard for s in sequences] == [0, 1, 1]
    assert {s.state for s in sequences} == {State.RUNNING}
    simulation.run()


def test_a_request_does_not_wait_for_the_budget_of_its_shard_while_another_has_some():
    simulation = large(2, num_slots=2, max_batch_tokens=10)
    long, other, short = add(
        simulation,
        Job(prompt_len=60, max_tokens=1),
        Job(prompt_len=100, max_tokens=1, aborts_after=1),
        Job(prompt_len=4, max_tokens=1),
    )
    assert (long.shard, other.shard, short.shard) == (0, 1, 0)
    simulation.step()
    assert short.state is State.WAITING
    simulation.abort(other)
    assert simulation.step().admitted == [short]
    assert short.shard == 1
    simulation.run()


def test_a_request_moves_whole_and_only_before_any_of_it_has_started():
    simulation = large(2, num_slots=2)
    [big] = add(simulation, Job(prompt_len=50, max_tokens=3))
    started = simulation.add(Job(prompt_len=9, max_tokens=30, n=3))
    whole = simulation.add(Job(prompt_len=9, max_tokens=5, n=2))
    assert {s.shard for s in (*started.sequences, *whole.sequences)} == {1}
    while big.state is not State.FINISHED:
        simulation.step()
    simulation.step()
    assert [s.state for s in started.sequences].count(State.WAITING) == 1
    assert {s.shard for s in started.sequences} == {1}, "the one that waits shares their prompt"
    assert {s.shard for s in whole.sequences} == {0}
    simulation.run()
    check_that_all_ended(simulation)


def test_a_resumed_sequence_waits_where_its_pages_are():
    simulation = large(2, num_slots=1)
    held, other = add(
        simulation,
        Job(prompt_len=9, max_tokens=4, lease=2),
        Job(prompt_len=30, max_tokens=8),
    )
    simulation.step()
    simulation.step()
    [blocking] = add(simulation, Job(prompt_len=3, max_tokens=25))
    assert held.state is State.HELD
    while held.state is State.HELD:
        simulation.run_one()
    assert held.state is State.WAITING
    assert held.shard == blocking.shard == 0
    while other.state is not State.FINISHED:
        simulation.step()
    simulation.step()
    assert held.state is State.WAITING
    assert simulation.running() == {blocking}, "shard 1 has nobody"
    simulation.run()
    assert events_of(held.group)[0][0] == [4, 5, 6], "computed once"
    rows = [row for plan in simulation.plans for row in plan.rows if row.sequence is held]
    assert [row.num_tokens for row in rows] == [9, 1, 1, 1]


def test_a_better_priority_takes_the_place_of_the_worst_rank_of_all_shards():
    simulation = large(2, num_slots=2)
    jobs = [Job(prompt_len=5, max_tokens=20, priority=p) for p in (5, 5, 7, 9)]
    running = add(simulation, *jobs)
    assert [s.shard for s in running] == [0, 1, 0, 1]
    for _ in range(3):
        simulation.step()
    [urgent] = add(simulation, Job(prompt_len=5, max_tokens=3, priority=0))
    assert urgent.shard == 0
    plan = simulation.step()
    assert plan.admitted == [urgent]
    assert urgent.shard == 1
    assert [s.num_preemptions for s in running] == [0, 0, 0, 1]
    assert simulation.scheduler.num_preemptions == 1
    simulation.run()
    check_that_all_ended(simulation)


def test_nobody_is_preempted_while_another_shard_has_room():
    simulation = large(2, num_slots=2)
    add(simulation, *[Job(prompt_len=n, max_tokens=20, priority=9) for n in (5, 40, 5)])
    for _ in range(3):
        simulation.step()
    [urgent] = add(simulation, Job(prompt_len=5, max_tokens=3, priority=0))
    assert urgent.shard == 0
    assert simulation.step().admitted == [urgent]
    assert urgent.shard == 1
    assert simulation.scheduler.num_preemptions == 0
    simulation.run()


def test_room_goes_to_the_best_priority_of_all_queues():
    simulation = large(3, num_slots=1)
    first, *_ = add(
        simulation,
        Job(prompt_len=40, max_tokens=2),
        Job(prompt_len=5, max_tokens=30),
        Job(prompt_len=5, max_tokens=30),
    )
    queued = add(
        simulation,
        Job(prompt_len=9, max_tokens=5, priority=3),
        Job(prompt_len=2, max_tokens=5, priority=8),
        Job(prompt_len=2, max_tokens=5, priority=8),
    )
    assert [s.shard for s in queued] == [1, 2, 2]
    while first.state is not State.FINISHED:
        simulation.step()
    assert simulation.step().admitted == [queued[0]]
    simulation.run()


def test_a_request_sent_back_for_pages_goes_on_where_there_are_some():
    simulation = large(2, num_slots=2, num_pages=6)
    stays, sent_back, other = add(
        simulation,
        Job(prompt_len=2 * PAGE, max_tokens=12),
        Job(prompt_len=3 * PAGE, max_tokens=1, arrives=0),
        Job(prompt_len=2 * PAGE, max_tokens=12),
    )
    assert (stays.shard, sent_back.shard, other.shard) == (0, 1, 0)
    while not other.num_preemptions:
        simulation.step()
    num_completed = other.num_completed
    for _ in range(3):
        simulation.step()
    assert (other.shard, other.state) == (1, State.RUNNING)
    assert stays.state is State.RUNNING
    assert num_completed > 0
    simulation.run()
    check_that_all_ended(simulation)


@pytest.mark.parametrize("num_shards", [2, 4])
def test_nobody_starves_behind_those_who_came_later(num_shards):
    simulation = large(num_shards, num_pages=12, num_slots=2, max_batch_tokens=8)
    rng = random.Random(5)
    jobs = [
        Job(
            prompt_len=rng.randint(1, 30),
            max_tokens=rng.randint(1, 9),
            n=rng.randint(1, 2),
            arrives=i // (2 * num_shards),
        )
        for i in range(200)
    ]
    simulation.run(jobs)
    begun = {}
    for number, plan in enumerate(simulation.plans):
        for row in plan.rows:
            begun.setdefault(row.sequence.group, number)
    starts = [begun[group] for group in simulation.groups]
    overtakers = [sum(s < start for s in starts[i + 1 :]) for i, start in enumerate(starts)]
    assert max(overtakers) <= 20, "by those that other shards had room for"
    assert len(starts) == 200


def test_leases_leave_every_shard_about_half_of_its_pages():
    simulation = large(2, num_slots=4, num_pages=20)
    most = 20 // 2 + 5
    for _ in range(40):
        # Loads that would send every lease to the same shard, were they all that counts.
        simulation.add(Job(prompt_len=5 * PAGE - 1, max_tokens=2, lease=10**6))
        simulation.add(Job(prompt_len=3 * PAGE, max_tokens=2 + simulation.num_steps % 7))
        for _ in range(5):
            simulation.step()
        leased = [sum(len(s.pages) for s in simulation.leased if s.shard == i) for i in (0, 1)]
        assert max(leased) <= most
    assert sum(leased) > 20, "half of all pages, and no more leases are granted"
    simulation.end_leases()
    simulation.run()
    assert simulation.scheduler.num_free_pages == simulation.scheduler.num_pages
    assert [shard.num_leased_tokens for shard in simulation.scheduler._shards] == [0, 0]


def test_expired_sequences_are_told_once_wherever_they_have_moved():
    simulation = large(2, num_slots=1)
    jobs = [Job(prompt_len=n, max_tokens=m) for n, m in ((20, 1), (5, 30), (5, 30))]
    sequences = add(simulation, *jobs)
    scheduler = simulation.scheduler
    for sequence, deadline in zip(sequences, (1.0, 3.0, 2.0), strict=True):
        scheduler.retire(sequence)
        sequence.deadline_s = deadline
        scheduler.add(sequence)
    assert [s.shard for s in sequences] == [0, 1, 1]
    for _ in range(3):
        simulation.step()
    assert [s.shard for s in sequences] == [0, 1, 0]
    assert scheduler.expired(1.5) == [], "the first has ended"
    assert scheduler.expired(2.5) == [sequences[2]]
    assert scheduler.expired(9.0) == [sequences[1]]
    for sequence in sequences[1:]:
        simulation.abort(sequence)


def test_when_the_cache_is_lost_every_shards_pages_come_back():
    simulation = large(2, num_slots=1)
    resumed = add(simulation, *[Job(prompt_len=9, max_tokens=5, lease=3)] * 2)
    for _ in range(2):
        simulation.run_one()
    running = add(simulation, *[Job(prompt_len=9, max_tokens=20)] * 2)
    [waits] = add(simulation, Job(prompt_len=9, max_tokens=6))
    while resumed[1].state is State.HELD:
        simulation.run_one()
    assert [(s.shard, s.state) for s in resumed] == [(i, State.WAITING) for i in (0, 1)]
    assert all(s.pages for s in (*resumed, *running))
    simulation.lose_cache()
    assert simulation.scheduler.num_free_pages == simulation.scheduler.num_pages
    simulation.run()
    ends = {s: events_of(s.group)[1][0].reason for s in (*resumed, *running, waits)}
    assert ends == dict.fromkeys(running, FinishReason.ABORT) | dict.fromkeys(
        (*resumed, waits), FinishReason.LENGTH
    )
