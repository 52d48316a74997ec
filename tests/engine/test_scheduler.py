"""The scheduler without a device: what every plan must obey, and what each rule is for."""

from hypothesis import given, settings

from pallasite.engine.request import FinishReason
from pallasite.engine.sequence import State
from tests.engine.scheduler_scenes import EOS, PAGE, Job, events_of, scenes
from tests.engine.scheduler_simulation import Simulation


@settings(max_examples=120)
@given(scenes())
def test_every_sequence_ends_no_page_leaks_and_every_plan_keeps_the_rules(scene):
    sizes, jobs = scene
    simulation = Simulation(**sizes)
    simulation.run(jobs)
    assert simulation.scheduler.num_free_pages == sizes["num_pages"]
    assert simulation.scheduler.num_running == simulation.scheduler.num_waiting == 0
    for group in simulation.groups:
        for sequence in group.sequences:
            assert sequence.state is State.FINISHED
            assert sequence.pages == []
    for sequence, job in simulation.jobs.items():
        expected = min(job.max_tokens, job.stops_after or job.max_tokens)
        if job.aborts_after is None:
            assert sequence.num_completed == expected
        else:
            assert sequence.num_completed <= expected


def test_a_resumed_prompt_that_waits_does_not_block_the_one_before_it_for_ever():
    simulation = Simulation(num_pages=5, num_slots=2, max_batch_tokens=18)
    held = Job(prompt_len=17, max_tokens=2, lease=0)
    simulation.run([held, Job(prompt_len=1, max_tokens=1)])
    [first, second, resumed] = simulation.groups
    assert [len(tokens[0]) for tokens, _ in map(events_of, (first, second, resumed))] == [1, 1, 1]


def test_long_prompts_come_in_chunks_beside_tokens_that_never_wait_for_them():
    simulation = Simulation(num_pages=64, num_slots=4, max_batch_tokens=10)
    for _ in range(2):
        simulation.add(Job(prompt_len=3, max_tokens=30))
    simulation.step()
    long = simulation.add(Job(prompt_len=60, max_tokens=1)).sequences[0]
    chunks = []
    while long.num_sampled < 1:
        plan = simulation.step()
        assert plan.parts[0].num_decode == 2
        [chunk] = [row.num_tokens for row in plan.rows if row.sequence is long]
        chunks.append(chunk)
    assert sum(chunks) == 60
    assert set(chunks[:-1]) == {8}, "two of ten tokens are the others'"
    simulation.run()


def test_completions_of_one_prompt_share_its_whole_pages():
    simulation = Simulation(num_pages=64, num_slots=4, max_batch_tokens=100)
    group = simulation.add(Job(prompt_len=4 * PAGE + 2, max_tokens=6, n=3))
    first, *others = group.sequences
    plans = [simulation.step() for _ in range(3)]
    for sibling in others:
        assert sibling.pages[:4] == first.pages[:4]
        assert set(sibling.pages[4:]).isdisjoint(first.pages)
        assert sibling.num_cached == 4 * PAGE
    assert first.num_cached == 0
    references = simulation.scheduler.pools[0].references()
    assert [references[page] for page in first.pages[:4]] == [3] * 4
    prefilled = sum(row.num_tokens for plan in plans for row in plan.rows if row.num_tokens > 1)
    assert prefilled == (4 * PAGE + 2) + 2 * 2, "the whole prompt once, its last two tokens thrice"
    simulation.run()
    tokens, finishes = events_of(group)
    assert {index: len(ids) for index, ids in tokens.items()} == {0: 6, 1: 6, 2: 6}
    assert [finishes[i].usage.cached_tokens for i in range(3)] == [0, 16, 16]


def test_a_better_priority_takes_the_place_of_the_worst_rank_at_once():
    simulation = Simulation(num_pages=64, num_slots=3, max_batch_tokens=100)
    running = [
        simulation.add(Job(prompt_len=5, max_tokens=20, priority=priority)).sequences[0]
        for priority in (5, 9, 5)
    ]
    for _ in range(3):
        simulation.step()
    urgent = simulation.add(Job(prompt_len=5, max_tokens=3, priority=0)).sequences[0]
    plan = simulation.step()
    assert plan.admitted == [urgent]
    assert running[1].state is State.WAITING
    assert running[1].num_preemptions == simulation.scheduler.num_preemptions == 1
    simulation.run()
    assert running[1].num_completed == 20
    assert [running[0].num_preemptions, running[2].num_preemptions] == [0, 0]


def test_an_equal_priority_waits_for_its_turn():
    simulation = Simulation(num_pages=64, num_slots=2, max_batch_tokens=100)
    groups = [simulation.add(Job(prompt_len=5, max_tokens=5)) for _ in range(6)]
    simulation.run()
    assert simulation.scheduler.num_preemptions == 0
    admitted = [s for plan in simulation.plans for s in plan.admitted]
    assert admitted == [group.sequences[0] for group in groups]


def test_when_pages_run_out_the_worst_rank_computes_again_later_and_loses_nothing():
    simulation = Simulation(num_pages=7, num_slots=3, max_batch_tokens=100)
    groups = [simulation.add(Job(prompt_len=2 * PAGE, max_tokens=9)) for _ in range(3)]
    simulation.run()
    preempted = [group.sequences[0].num_preemptions for group in groups]
    assert preempted[0] == 0, "the best rank is never sent back"
    assert sum(preempted) == simulation.scheduler.num_preemptions >= 2
    for group in groups:
        tokens, finishes = events_of(group)
        assert tokens[0] == [EOS + 1 + place for place in range(1, 10)]
        assert finishes[0].reason is FinishReason.LENGTH


def test_a_stop_is_seen_one_step_late_and_what_came_after_it_is_dropped():
    simulation = Simulation(num_pages=8, num_slots=2, max_batch_tokens=100)
    group = simulation.add(Job(prompt_len=3, max_tokens=50, stops_after=4))
    simulation.run()
    tokens, finishes = events_of(group)
    assert tokens[0] == [EOS + 2, EOS + 3, EOS + 4]
    assert finishes[0].reason is FinishReason.STOP
    assert finishes[0].matched == EOS
    assert finishes[0].usage.completion_tokens == 3
    assert group.sequences[0].num_sampled == 5, "one more was on its way"
    assert len(simulation.plans) == 5


def test_a_held_sequence_keeps_its_pages_and_computes_nothing_again():
    simulation = Simulation(num_pages=8, num_slots=2, max_batch_tokens=100)
    simulation.run([Job(prompt_len=9, max_tokens=4, lease=7)])
    first, resumed = simulation.groups
    assert [events_of(group)[0][0] for group in (first, resumed)] == [[3], [4, 5, 6]]
    assert [row.num_tokens for plan in simulation.plans for row in plan.rows] == [9, 1, 1, 1]


def test_expired_sequences_are_told_once_and_only_while_they_are_open():
    simulation = Simulation(num_pages=8, num_slots=2, max_batch_tokens=100)
    scheduler = simulation.scheduler
    sequences = []
    for deadline in (3.0, 1.0, None, 2.0):
        [sequence] = simulation.add(Job(prompt_len=3, max_tokens=9)).sequences
        scheduler.retire(sequence)
        sequence.deadline_s = deadline
        scheduler.add(sequence)
        sequences.append(sequence)
    assert scheduler.expired(0.5) == []
    assert scheduler.expired(1.0) == [sequences[1]]
    assert scheduler.expired(1.5) == []
    simulation.abort(sequences[3])
    assert scheduler.expired(9.0) == [sequences[0]]
    assert scheduler.expired(9.0) == []
    for sequence in sequences[:3]:
        simulation.abort(sequence)


def test_nobody_starves_behind_those_who_came_later():
    simulation = Simulation(num_pages=12, num_slots=3, max_batch_tokens=8)
    jobs = [
        Job(prompt_len=1 + (7 * i) % 30, max_tokens=1 + i % 9, n=1 + i % 2, arrives=i // 2)
        for i in range(150)
    ]
    simulation.run(jobs)
    first_rows = {}
    for number, plan in enumerate(simulation.plans):
        for row in plan.rows:
            first_rows.setdefault(row.sequence, number)
    begun = [first_rows[group.sequences[0]] for group in simulation.groups]
    assert begun == sorted(begun)
    assert len(begun) == 150
