"""Drafts in the scheduler without a device: the same rules, the same tokens, fewer steps."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pallasite.engine.request import FinishReason
from pallasite.engine.sequence import State
from tests.engine.scheduler_scenes import EOS, PAGE, Job, events_of, scenes
from tests.engine.speculative_simulation import WRONG, SpeculativeSimulation


@settings(max_examples=150)
@given(st.integers(1, 3).flatmap(scenes), st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_every_sequence_has_the_tokens_that_it_has_without_drafts(scene, seed, num_drafts):
    sizes, jobs = scene
    simulation = SpeculativeSimulation(**sizes, seed=seed, num_drafts=num_drafts)
    simulation.run(jobs)
    assert simulation.scheduler.num_free_pages == sizes["num_pages"]
    assert simulation.scheduler.num_running == simulation.scheduler.num_waiting == 0
    for sequence, job in simulation.jobs.items():
        assert sequence.state is State.FINISHED
        assert sequence.pages == []
        expected = min(job.max_tokens, job.stops_after or job.max_tokens)
        completed = sequence.token_ids[sequence.num_prompt :]
        said = [EOS + 2 + place for place in range(len(completed))]
        if job.stops_after is not None and len(completed) == job.stops_after:
            said[-1] = EOS
        assert completed == said
        assert WRONG not in sequence.token_ids
        if job.aborts_after is None:
            assert len(completed) == expected
        assert sequence.accepted_tokens <= sequence.draft_tokens


def with_all_drafts(num_pages=64, num_drafts=4, **more):
    """A simulation whose every draft is as long as may be, and right."""

    class Right(SpeculativeSimulation):
        def _draft(self, row):
            most = min(self._num_drafts, row.sequence.num_unsampled) if row.samples else 0
            return tuple(self._sampled(row.sequence, row.certain_end + i) for i in range(most))

    sizes = {"num_slots": 2, "max_batch_tokens": 100} | more
    simulation = Right(seed=0, num_pages=num_pages, num_drafts=num_drafts, **sizes)
    simulation.waits = 1.0
    return simulation


def test_right_drafts_make_fewer_steps_and_never_more_than_max_tokens():
    simulation = with_all_drafts()
    [sequence] = simulation.add_each(Job(prompt_len=3, max_tokens=13))
    simulation.run()
    assert [len(row.draft) for plan in simulation.plans for row in plan.rows] == [0, 4, 4, 1]
    assert sequence.num_completed == 13
    assert (sequence.draft_tokens, sequence.accepted_tokens) == (9, 9)
    assert simulation.committer.accepted_tokens == 9


def test_a_stop_within_a_draft_ends_the_completion_there():
    simulation = with_all_drafts(num_drafts=6)
    group = simulation.add(Job(prompt_len=3, max_tokens=50, stops_after=4))
    simulation.run()
    tokens, finishes = events_of(group)
    assert tokens[0] == [EOS + 2, EOS + 3, EOS + 4]
    assert finishes[0].reason is FinishReason.STOP
    assert finishes[0].usage.completion_tokens == 3
    assert finishes[0].usage.draft_tokens == 6
    assert finishes[0].usage.accepted_tokens == 3, "what came after the stop is not counted"


def test_drafts_take_what_pages_are_free_and_preempt_nobody():
    simulation = with_all_drafts(num_pages=5, num_drafts=9)
    simulation.add_each(*[Job(prompt_len=PAGE + 1, max_tokens=7) for _ in range(2)])
    simulation.step()
    plan = simulation.step()
    assert sorted(len(row.draft) for row in plan.rows) == [2, 5], "to the pages' ends"
    assert simulation.scheduler.num_preemptions == 0
    simulation.run()


def test_the_pages_of_wrong_tokens_come_back_at_once():
    simulation = SpeculativeSimulation(seed=0, num_pages=8, num_slots=2, max_batch_tokens=100)
    [sequence] = simulation.add_each(Job(prompt_len=PAGE - 1, max_tokens=20))
    simulation._draft = lambda row: (WRONG,) * min(5, row.sequence.num_unsampled)
    simulation.waits = 1.0
    simulation.step()
    plan = simulation.step()
    assert plan.rows[0].draft == (WRONG,) * 5
    assert len(sequence.pages) == 3
    simulation._commit_previous()
    assert len(sequence.pages) == 2
    assert simulation.scheduler.num_free_pages == 6
    simulation.run()


def test_a_step_that_computes_a_prompt_has_no_drafts():
    simulation = with_all_drafts(max_batch_tokens=10)
    simulation.add(Job(prompt_len=3, max_tokens=30))
    simulation.step()
    simulation.add(Job(prompt_len=30, max_tokens=30))
    simulation.run()
    assert not any(plan.has_drafts and plan.has_prefill for plan in simulation.plans)
    assert any(plan.has_drafts for plan in simulation.plans)
