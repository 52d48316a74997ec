"""Deadlines under more load than can be served in time."""

import time

from pallasite.engine import ErrorCode
from tests.engine.answers import assert_same_answers
from tests.engine.harness import greedy, random_prompt, stepped, tokens


def test_requests_that_expire_in_the_queue_compute_no_token(
    engine, rng, monkeypatch, repetitions, figures
):
    count = repetitions(100, 1000)
    prompts = [random_prompt(rng, int(rng.integers(1, 60))) for _ in range(count)]
    requests = [greedy(prompt, max_tokens=30, ignore_eos=True) for prompt in prompts]
    whole = tokens(engine.generate(requests))
    steps = []
    schedule = engine._scheduler.schedule

    def record(now):
        plan = schedule(now)
        if plan is not None:
            steps.append((now, plan))
        return plan

    monkeypatch.setattr(engine._scheduler, "schedule", record)
    with stepped(engine, monkeypatch):
        # A quarter is late before the first step, a quarter may be, and half has time enough.
        timeouts = [(0.001, 0.5 * rng.random() + 0.01, None, None)[i % 4] for i in range(count)]
        streams = [
            engine.submit(greedy(prompt, max_tokens=30, ignore_eos=True, timeout_s=timeout_s))
            for prompt, timeout_s in zip(prompts, timeouts, strict=True)
        ]
        time.sleep(0.005)
    ends = [list(stream) for stream in streams]
    num_late = num_in_queue = 0
    begun = {row.sequence.group.stream for _, plan in steps for row in plan.rows}
    for now, plan in steps:
        for row in plan.rows:
            deadline_s = row.sequence.deadline_s
            assert deadline_s is None or now < deadline_s, "nothing is computed too late"
    for index, stream in enumerate(streams):
        events = ends[index]
        ids = tuple(i for event in events for i in event.token_ids)
        assert_same_answers([requests[index]], [ids], [whole[index][: len(ids)]])
        finish = events[-1].finish
        if finish.error is None:
            assert timeouts[index] != 0.001
            assert len(ids) == 30
            continue
        assert finish.error.code is ErrorCode.DEADLINE_EXCEEDED
        assert timeouts[index] is not None
        num_late += 1
        if stream not in begun:
            num_in_queue += 1
            assert ids == ()
            assert finish.usage.completion_tokens == 0
    assert num_in_queue >= count // 4
    assert begun.isdisjoint(streams[::4])
    figures(requests=count, late=num_late, expired_in_queue=num_in_queue, tokens_for_those=0)
