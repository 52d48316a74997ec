"""Several shards as one: where requests go, and each rule of a plan on every shard."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallasite.engine.dispatcher import Dispatcher
from pallasite.engine.plan import make_plan
from pallasite.engine.request import FinishReason
from pallasite.engine.sequence import State
from tests.engine.scheduler_scenes import PAGE, Job, events_of, scenes
from tests.engine.scheduler_simulation import Simulation, simulation_of


class OneScheduler(Dispatcher):
    """A scheduler alone, which places and moves nothing."""

    def add(self, sequence):
        sequence.shard = 0
        self._shards[0].add(sequence)

    def schedule(self, now):
        return make_plan([self._shards[0].schedule(now)])


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
    simulation = simulation_of(2, num_slots=8)
    jobs = [Job(prompt_len=n, max_tokens=20) for n in (9, 12, 2, 2)]
    assert [s.shard for s in simulation.add_each(*jobs)] == [0, 1, 0, 0], "9, 12, then 11, then 13"
    group = simulation.add(Job(prompt_len=3, max_tokens=20, n=3))
    assert [s.shard for s in group.sequences] == [1, 1, 1], "12, and 21 after it"
    [after] = simulation.add_each(Job(prompt_len=1, max_tokens=1))
    assert after.shard == 0
    simulation.run()
    check_that_all_ended(simulation)


def test_tokens_that_were_sampled_and_leases_count_where_a_request_goes():
    simulation = simulation_of(2)
    leased, other = simulation.add_each(
        Job(prompt_len=10, max_tokens=5, lease=10),
        Job(prompt_len=7, max_tokens=30),
    )
    assert (leased.shard, other.shard) == (0, 1)
    for _ in range(3):
        simulation.step()
    assert leased.state is State.HELD
    assert (leased.num_tokens, other.num_tokens) == (11, 10)
    assert simulation.add_each(Job(prompt_len=5, max_tokens=1))[0].shard == 1
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
    simulation = simulation_of(num_shards, num_slots=num_slots, max_batch_tokens=budget)
    simulation.add_each(*[Job(prompt_len=prompt_len, max_tokens=max_tokens)] * count)
    most = prompt_len + max_tokens + PAGE
    while simulation.scheduler.num_running + simulation.scheduler.num_waiting:
        simulation.step()
        cached = [simulation.num_cached(shard) for shard in range(num_shards)]
        assert max(cached) - min(cached) <= most


@pytest.mark.parametrize("num_shards", [2, 4])
def test_nobody_starves_behind_those_who_came_later(num_shards):
    simulation = simulation_of(num_shards, num_pages=12, num_slots=2, max_batch_tokens=8)
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


@pytest.mark.parametrize(
    ("busy_len", "prompt_len", "count"), [(60, 5 * PAGE - 1, 8), (30, 1, 20), (30, PAGE + 1, 10)]
)
def test_leases_of_long_and_short_prompts_leave_every_shard_half_of_its_pages(
    busy_len, prompt_len, count
):
    simulation = simulation_of(2, num_slots=4, num_pages=20)
    # By its load alone, shard 1 would have them all.
    [busy] = simulation.add_each(Job(prompt_len=busy_len, max_tokens=9))
    for _ in range(count):
        simulation.add_each(Job(prompt_len=prompt_len, max_tokens=2, lease=10**6))
        simulation.step()
    assert busy.shard == 0
    for _ in range(30):
        simulation.step()
    leased = [sum(len(s.pages) for s in simulation.leased if s.shard == i) for i in (0, 1)]
    assert leased == [10, 10], "half of each, where all of one would be half of all"
    simulation.end_leases()
    simulation.run()
    assert simulation.scheduler.num_free_pages == simulation.scheduler.num_pages
    assert [shard.num_leased_pages for shard in simulation.scheduler._shards] == [0, 0]


def test_a_lease_of_more_than_half_of_a_shard_goes_where_the_fewest_are():
    simulation = simulation_of(2, num_pages=10)
    small, _, big = simulation.add_each(
        Job(prompt_len=12, max_tokens=2, lease=9),
        Job(prompt_len=15, max_tokens=9),
        Job(prompt_len=24, max_tokens=2, lease=9),
    )
    assert (small.lease_s, big.lease_s) == (1.0, 1.0)
    assert (small.shard, big.shard) == (0, 1), "by load it would be the other"
    simulation.run()


def test_an_urgent_prompt_that_is_to_be_leased_counts_once_on_the_shard_where_it_waits():
    simulation = simulation_of(2, num_slots=1, num_pages=10)
    jobs = [Job(prompt_len=n, max_tokens=9, priority=p) for n, p in ((5, 9), (20, 5))]
    running = simulation.add_each(*jobs)
    simulation.step()
    [urgent] = simulation.add_each(Job(prompt_len=12, max_tokens=3, lease=3))
    simulation.step()
    assert (urgent.shard, urgent.state) == (0, State.RUNNING)
    assert [s.num_preemptions for s in running] == [1, 0]
    simulation.run()


def test_expired_sequences_are_told_once_wherever_they_have_moved():
    simulation = simulation_of(2, num_slots=1)
    jobs = [Job(prompt_len=n, max_tokens=m) for n, m in ((20, 1), (5, 30), (5, 30))]
    sequences = simulation.add_each(*jobs)
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
    simulation = simulation_of(2, num_slots=1)
    resumed = simulation.add_each(*[Job(prompt_len=9, max_tokens=5, lease=3)] * 2)
    for _ in range(2):
        simulation.run_one()
    running = simulation.add_each(*[Job(prompt_len=9, max_tokens=20)] * 2)
    [waits] = simulation.add_each(Job(prompt_len=9, max_tokens=6))
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
