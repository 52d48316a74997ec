"""What a sequence drafts, how it learns what drafts are worth, and which of them a step takes."""

import numpy as np
import pytest

from pallasite.engine.drafter import FIRST_CHANCE, Draft, Drafter
from pallasite.engine.layout import Bucket
from pallasite.engine.speculation import Speculator
from pallasite.engine.step_times import never_falling
from tests.engine.scheduler_scenes import Job
from tests.engine.scheduler_simulation import Simulation


def test_a_draft_is_what_followed_and_nothing_where_nothing_repeats():
    drafter = Drafter()
    assert drafter.draft([1, 2, 3, 4], 3) is None
    assert drafter.draft([1, 2, 3, 4, 1, 2], 3) == Draft(token_ids=(3, 4, 1), chance=FIRST_CHANCE)
    assert drafter.draft([1, 2, 3, 4, 1, 2], 1).token_ids == (3,)


def test_what_came_true_makes_the_next_draft_likelier_and_what_did_not_less_likely():
    drafter, token_ids = Drafter(), [1, 2, 3, 4, 5, 6] * 3
    chances = [drafter.draft(token_ids, 2).chance]
    for token_id in (1, 2, 3, 4):
        token_ids.append(token_id)
        chances.append(drafter.draft(token_ids, 2).chance)
    assert chances == sorted(set(chances))
    again = drafter.draft(token_ids, 2).chance
    assert again == chances[-1], "asking twice teaches nothing"
    token_ids.append(9)  # a 5 was foreseen
    assert drafter.draft(token_ids, 2) is None
    token_ids += [1, 2, 3, 4]
    assert drafter.draft(token_ids, 2).chance < chances[-1]


def test_each_length_of_ngram_learns_for_itself():
    drafter = Drafter()
    token_ids = [7, 8, 1, 7, 8]
    assert drafter.draft(token_ids, 1) == Draft(token_ids=(1,), chance=FIRST_CHANCE)
    token_ids += [2, 3, 4, 7, 8]
    low = drafter.draft(token_ids, 1)
    assert (low.token_ids, low.chance < FIRST_CHANCE) == ((2,), True)
    token_ids += [2, 3, 4]
    high = drafter.draft(token_ids, 1)
    assert (high.token_ids, high.chance) == ((7,), FIRST_CHANCE), "of four tokens"


def test_the_chance_nears_the_share_that_comes_true():
    rng, drafter, token_ids = np.random.default_rng(0), Drafter(), [1, 2, 3] * 4
    chances = []
    for _ in range(4000):
        draft = drafter.draft(token_ids, 1)
        if draft is None:
            token_ids += [1, 2, 3, 1, 2, 3]
            continue
        chances.append(draft.chance)
        is_right = rng.random() < 0.7
        token_ids.append(draft.token_ids[0] if is_right else int(rng.integers(10, 10**6)))
    assert np.mean(chances[100:]) == pytest.approx(0.7, abs=0.06)


def seconds(**by_kind):
    """A table of a decode step and verify steps of two rows and four drafts."""
    times = {Bucket(num_tokens=2, num_rows=2): float(by_kind.pop("decode"))}
    for name, value in by_kind.items():
        count = int(name.removeprefix("verify"))
        times[Bucket(num_tokens=count, num_rows=2, num_drafts=4)] = float(value)
    return times


def choose(times, *chances):
    """The lengths of the drafts that a step of one shard takes, of rows with these chances."""
    simulation = Simulation(num_pages=64, num_slots=2, max_batch_tokens=100)
    simulation.add_each(*[Job(prompt_len=3, max_tokens=50) for _ in chances])
    simulation.step()
    simulation._commit_previous()
    plan = simulation.scheduler.schedule(0.0)
    speculator = Speculator(simulation.scheduler, 4, times)
    drafts = {
        row.sequence: None if chance is None else Draft(token_ids=(5,) * 4, chance=chance)
        for row, chance in zip(plan.rows, chances, strict=True)
    }
    speculator._draft = lambda sequence, most: drafts[sequence]
    plan = speculator.with_drafts(plan)
    by_sequence = {row.sequence: len(row.draft) for row in plan.rows}
    return [by_sequence[sequence] for sequence in drafts]


@pytest.mark.parametrize(
    ("times", "chances", "lengths"),
    [
        pytest.param(seconds(decode=1, verify4=1, verify8=1), (0.9, 0.9), [3, 3], id="free"),
        pytest.param(seconds(decode=1, verify4=9, verify8=9), (0.9, 0.9), [0, 0], id="dear"),
        pytest.param(seconds(decode=1, verify4=1.5, verify8=9), (0.9, 0.9), [1, 1], id="some"),
        pytest.param(seconds(decode=1, verify4=1.5, verify8=9), (0.1, 0.9), [0, 2], id="better"),
        pytest.param(seconds(decode=1, verify4=1.5, verify8=9), (0.1, 0.2), [0, 0], id="poor"),
        pytest.param(seconds(decode=1, verify4=1.5, verify8=9), (None, 0.9), [0, 2], id="one"),
        pytest.param(seconds(decode=1, verify4=1, verify8=1), (None, None), [0, 0], id="none"),
        pytest.param(seconds(decode=1), (0.9, 0.9), [0, 0], id="no programs"),
        pytest.param({}, (0.9, 0.9), [0, 0], id="nothing measured"),
    ],
)
def test_a_step_takes_the_drafts_that_promise_most_tokens_a_second(times, chances, lengths):
    assert choose(times, *chances) == lengths


def test_the_time_of_a_step_decides_by_the_tokens_that_it_promises():
    # Two rows: a draft of chance 0.5 makes two tokens 2.5.
    for verify_s, drafted in ((1.15, 1), (1.25, 0)):
        times = {
            Bucket(num_tokens=2, num_rows=2): 1.0,
            Bucket(num_tokens=3, num_rows=2, num_drafts=4): verify_s,
        }
        assert sum(choose(times, 0.5, None)) == drafted


def test_a_disturbed_time_is_not_above_a_larger_steps():
    def bucket(num_tokens, num_drafts=0):
        return Bucket(num_tokens=num_tokens, num_rows=2, num_drafts=num_drafts)

    times = {bucket(2): 9.0, bucket(4): 2.0, bucket(4, 3): 5.0, bucket(8, 3): 3.0}
    expected = {bucket(2): 2.0, bucket(4): 2.0, bucket(4, 3): 3.0, bucket(8, 3): 3.0}
    assert never_falling(times) == expected
    assert never_falling(expected) == expected


def test_a_request_of_one_token_and_a_lease_draft_nothing():
    simulation = Simulation(num_pages=64, num_slots=2, max_batch_tokens=100)
    for job in (Job(prompt_len=1, max_tokens=1), Job(prompt_len=1, max_tokens=9, lease=3)):
        simulation.add(job)
    speculator = Speculator(simulation.scheduler, 4, seconds(decode=1.0, verify4=1.0, verify8=1.0))
    plan = simulation.scheduler.schedule(0.0)
    assert [row.samples for row in plan.rows] == [True, True]
    assert not speculator.with_drafts(plan).has_drafts
    assert all(row.sequence.drafter is None for row in plan.rows)


def test_without_speculation_nothing_is_looked_up():
    simulation = Simulation(num_pages=64, num_slots=2, max_batch_tokens=100)
    [sequence] = simulation.add_each(Job(prompt_len=9, max_tokens=9))
    simulation.step()
    simulation._commit_previous()
    speculator = Speculator(simulation.scheduler, 0, {})
    plan = simulation.scheduler.schedule(0.0)
    assert speculator.with_drafts(plan) is plan
    assert not speculator.awaits_tokens()
    assert sequence.drafter is None


def test_the_loop_waits_for_tokens_only_where_those_before_them_repeat():
    simulation = Simulation(num_pages=64, num_slots=2, max_batch_tokens=100)
    speculator = Speculator(simulation.scheduler, 4, seconds(decode=1.0, verify4=1.0, verify8=1.0))
    [sequence] = simulation.add_each(Job(prompt_len=3, max_tokens=9))  # its prompt is 0, 0, 0
    simulation.step()
    assert speculator.awaits_tokens()
    simulation._commit_previous()
    sequence.token_ids[:] = [1, 2, 3, 4]
    sequence.drafter = None
    assert not speculator.awaits_tokens()
