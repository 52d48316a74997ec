"""What goes to another shard than the one it was given to, and what stays."""

from pallasite.engine.sequence import State
from tests.engine.scheduler_scenes import PAGE, Job, events_of
from tests.engine.scheduler_simulation import simulation_of


def test_a_shard_without_a_queue_takes_the_best_rank_of_the_longest_one_and_starts_it_at_once():
    simulation = simulation_of(3, num_slots=1)
    first = simulation.add_each(
        *[Job(prompt_len=n, max_tokens=m) for n, m in ((30, 2), (5, 30), (5, 30))]
    )
    # Two wait on shard 1 and three on shard 2, while shard 0 has more tokens than any of them.
    queued = simulation.add_each(*[Job(prompt_len=n, max_tokens=9) for n in (3, 2, 3, 4, 4)])
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


def test_what_can_start_where_it_waits_stays_there():
    simulation = simulation_of(2, num_slots=2)
    sequences = simulation.add_each(*[Job(prompt_len=n, max_tokens=5) for n in (9, 2, 2)])
    assert [s.shard for s in sequences] == [0, 1, 1]
    simulation.step()
    assert [s.shard for s in sequences] == [0, 1, 1]
    assert {s.state for s in sequences} == {State.RUNNING}
    simulation.run()


def test_a_request_does_not_wait_for_the_budget_of_its_shard_while_another_has_some():
    simulation = simulation_of(2, num_slots=2, max_batch_tokens=10)
    long, other, short = simulation.add_each(
        Job(prompt_len=60, max_tokens=1),
        Job(prompt_len=100, max_tokens=1),
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
    simulation = simulation_of(2, num_slots=2)
    [big] = simulation.add_each(Job(prompt_len=50, max_tokens=3))
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


def test_a_resumed_sequence_waits_where_its_pages_are():
    simulation = simulation_of(2, num_slots=1)
    held, other = simulation.add_each(
        Job(prompt_len=9, max_tokens=4, lease=2),
        Job(prompt_len=30, max_tokens=8),
    )
    simulation.step()
    simulation.step()
    [blocking] = simulation.add_each(Job(prompt_len=3, max_tokens=25))
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
    simulation = simulation_of(2, num_slots=2)
    jobs = [Job(prompt_len=5, max_tokens=20, priority=p) for p in (5, 5, 7, 9)]
    running = simulation.add_each(*jobs)
    assert [s.shard for s in running] == [0, 1, 0, 1]
    for _ in range(3):
        simulation.step()
    [urgent] = simulation.add_each(Job(prompt_len=5, max_tokens=3, priority=0))
    assert urgent.shard == 0
    plan = simulation.step()
    assert plan.admitted == [urgent]
    assert urgent.shard == 1
    assert [s.num_preemptions for s in running] == [0, 0, 0, 1]
    assert simulation.scheduler.num_preemptions == 1
    simulation.run()


def test_nobody_is_preempted_while_another_shard_has_room():
    simulation = simulation_of(2, num_slots=2)
    simulation.add_each(*[Job(prompt_len=n, max_tokens=20, priority=9) for n in (5, 40, 5)])
    for _ in range(3):
        simulation.step()
    [urgent] = simulation.add_each(Job(prompt_len=5, max_tokens=3, priority=0))
    assert urgent.shard == 0
    assert simulation.step().admitted == [urgent]
    assert urgent.shard == 1
    assert simulation.scheduler.num_preemptions == 0
    simulation.run()


def test_nobody_is_preempted_elsewhere_for_one_who_waits_for_the_budget_alone():
    simulation = simulation_of(2, num_slots=2, num_pages=400, max_batch_tokens=100)
    jobs = [Job(prompt_len=n, max_tokens=5, priority=p) for n, p in ((900, 0), (500, 9), (500, 9))]
    simulation.add_each(*jobs)
    [urgent] = simulation.add_each(Job(prompt_len=5, max_tokens=3, priority=0))
    for _ in range(3):
        simulation.step()
    assert (urgent.shard, urgent.state) == (0, State.WAITING)
    assert simulation.scheduler.num_preemptions == 0
    simulation.run()


def test_two_urgent_requests_do_not_wait_for_the_same_place():
    simulation = simulation_of(2, num_slots=1)
    simulation.add_each(
        Job(prompt_len=5, max_tokens=9), Job(prompt_len=40, max_tokens=9, priority=9)
    )
    simulation.step()
    urgent = simulation.add_each(*[Job(prompt_len=5, max_tokens=9)] * 2)
    assert [s.shard for s in urgent] == [0, 0]
    simulation.step()
    assert [s.state for s in urgent] == [State.RUNNING, State.WAITING]
    assert [s.shard for s in urgent] == [1, 0]
    simulation.run()


def test_nobody_is_preempted_for_one_who_would_lack_pages_all_the_same():
    simulation = simulation_of(2, num_slots=1, num_pages=10)
    simulation.add_each(Job(prompt_len=12, max_tokens=20))
    [held] = simulation.add_each(Job(prompt_len=15, max_tokens=5, priority=9, lease=30))
    simulation.step()
    simulation.step()
    assert (held.shard, held.state) == (1, State.HELD)
    simulation.add_each(Job(prompt_len=13, max_tokens=20, priority=9))
    simulation.step()
    [urgent] = simulation.add_each(Job(prompt_len=30, max_tokens=5, priority=0))
    for _ in range(3):
        simulation.step()
        assert (urgent.shard, urgent.state) == (0, State.WAITING)
    assert simulation.scheduler.num_preemptions == 0
    simulation.run()


def test_nobody_overtakes_the_head_of_a_queue_for_a_shard_that_is_busy():
    simulation = simulation_of(2, num_slots=3, num_pages=10)
    jobs = [Job(prompt_len=n, max_tokens=9) for n in (24, 20, 24, 30, 1)]
    _, _, head, leaves, behind = simulation.add_each(*jobs)
    assert [s.shard for s in (head, leaves, behind)] == [1, 0, 1]
    simulation.abort(leaves)
    simulation.step()
    assert {s.state for s in (head, behind)} == {State.WAITING}
    assert {s.shard for s in (head, behind)} == {1}
    simulation.run()


def test_nobody_moves_to_queue_behind_another():
    simulation = simulation_of(2, num_slots=2, num_pages=10)
    jobs = [Job(prompt_len=n, max_tokens=9) for n in (20, 10, 11, 24, 1)]
    *_, head, last = simulation.add_each(*jobs)
    assert (head.shard, last.shard) == (0, 1)
    simulation.step()
    assert (head.state, last.state) == (State.WAITING, State.WAITING)
    assert last.shard == 1, "shard 0 has a slot and pages, but for the one that waits there"
    simulation.run()


def test_a_shard_that_would_idle_takes_one_from_behind_the_head_of_a_queue():
    simulation = simulation_of(2, num_slots=3, num_pages=10)
    held, _ = simulation.add_each(
        Job(prompt_len=15, max_tokens=2, lease=10),
        Job(prompt_len=20, max_tokens=12),
    )
    simulation.step()
    simulation.step()
    assert (held.shard, held.state) == (0, State.HELD)
    leaves, head, behind = simulation.add_each(
        *[Job(prompt_len=n, max_tokens=1) for n in (39, 32, 1)]
    )
    assert [s.shard for s in (leaves, head, behind)] == [0, 1, 1]
    simulation.abort(leaves)
    assert simulation.step().admitted == [behind]
    assert behind.shard == 0
    assert (head.shard, head.state) == (1, State.WAITING), "leases leave it no room on shard 0"
    simulation.run()


def test_room_goes_to_the_best_priority_of_all_queues():
    simulation = simulation_of(3, num_slots=1)
    first, *_ = simulation.add_each(
        Job(prompt_len=40, max_tokens=2),
        Job(prompt_len=5, max_tokens=30),
        Job(prompt_len=5, max_tokens=30),
    )
    queued = simulation.add_each(
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
    simulation = simulation_of(2, num_slots=2, num_pages=6)
    stays, sent_back, other = simulation.add_each(
        Job(prompt_len=2 * PAGE, max_tokens=12),
        Job(prompt_len=3 * PAGE, max_tokens=1),
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
