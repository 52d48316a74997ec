"""Several steps in one launch: the same answers, and only where nobody waits for them."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from pallasite.engine import Engine, EngineConfig, FinishReason, Request, SamplingParams, bursts
from pallasite.engine.bursts import Bursts
from pallasite.engine.dispatcher import Dispatcher
from pallasite.engine.layout import Bucket
from pallasite.engine.request import TokenEvent
from pallasite.engine.sequence import new_group
from pallasite.engine.stream import TokenStream
from pallasite.models.sharding import MeshShape
from pallasite.pallas_kernels.cpu import best_instructions
from tests.engine.harness import (
    assert_quiet,
    greedy,
    random_params,
    random_prompt,
    stepped,
    tokens,
)
from tests.engine.toy_runtime import EOS, ToyRuntime, answers

CONFIG = EngineConfig(
    weights="f32", max_requests=8, max_batch_tokens=64, max_context_len=256, num_pages=160
)
BUCKET = Bucket(num_tokens=2, num_rows=2, max_steps=8)


@contextmanager
def toy_engine(num_shards, config=CONFIG):
    with Engine(ToyRuntime(config, num_shards, max_steps=8), config) as engine:
        yield engine
        assert engine.metrics.is_alive
        assert_quiet(engine)
        assert engine.metrics.misses == 0


@pytest.mark.parametrize("pages_each", [40, 8])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_answers_are_those_of_single_steps(rng, num_shards, pages_each):
    config = replace(CONFIG, num_pages=num_shards * pages_each)
    with toy_engine(num_shards, config) as engine:
        for count in (1, 2, 3, 5, 8) * 3:
            requests = [
                Request(
                    prompt_ids=random_prompt(rng, int(rng.integers(1, 60))),
                    params=SamplingParams(
                        max_tokens=int(rng.integers(1, 40)), ignore_eos=bool(rng.random() < 0.5)
                    ),
                )
                for _ in range(count)
            ]
            assert tokens(engine.generate(requests)) == [answers(one) for one in requests]
        lengths = engine._runtime.num_steps
        assert max(lengths) > 4
        assert sum(lengths) == engine.metrics.num_steps


def test_what_comes_after_a_stop_is_dropped(rng):
    prompts = (random_prompt(rng, 10) for _ in range(10_000))
    requests = (greedy(prompt, max_tokens=100) for prompt in prompts)
    ends = {}  # a request for each place in a burst at which it may stop
    for request in requests:
        if (place := len(answers(request))) < 100:
            ends.setdefault(place % 8, request)
        if len(ends) == 8:
            break
    assert len(ends) == 8
    with toy_engine(1) as engine:
        for request in ends.values():
            [completion] = engine.generate([request])
            assert completion.token_ids == answers(request)
            assert completion.finish.reason is FinishReason.STOP
            assert completion.finish.matched == EOS
            assert completion.finish.usage.completion_tokens == len(completion.token_ids)
        assert max(engine._runtime.num_steps) > 1


def test_a_reader_who_leaves_ends_a_request_within_a_burst(rng):
    with toy_engine(1) as engine:
        long = greedy(random_prompt(rng, 10), max_tokens=200, ignore_eos=True)
        stream = engine.submit(long)
        next(iter(stream))
        engine.abort(stream.request_id)
        request = greedy(random_prompt(rng, 10), max_tokens=20)
        assert tokens(engine.generate([request])) == [answers(request)]


def test_who_arrives_during_a_burst_is_in_the_next_launch(rng, monkeypatch):
    first, second = (greedy(random_prompt(rng, 10), max_tokens=60, ignore_eos=True) for _ in "ab")
    with toy_engine(1) as engine:
        launched, streams = [], []
        launch, commit = engine._stepper.launch, engine._stepper.commit

        def record(plan):
            launched.append(plan)
            return launch(plan)

        def arrive_and_commit(burst, grant):
            if burst.plan.num_steps > 1 and not streams:
                launched.clear()
                streams.append(engine.submit(second))
            commit(burst, grant)

        monkeypatch.setattr(engine._stepper, "launch", record)
        monkeypatch.setattr(engine._stepper, "commit", arrive_and_commit)
        assert tokens(engine.generate([first])) == [answers(first)]
        assert sum((event.token_ids for event in streams[0]), ()) == answers(second)
        assert launched[0].has_prefill


def test_tokens_that_come_together_do_not_end_a_reader_who_takes_them_at_once(rng, monkeypatch):
    request = greedy(random_prompt(rng, 10), max_tokens=20, ignore_eos=True)
    monkeypatch.setattr(bursts, "LONGEST_S", 1e9)
    with toy_engine(1, replace(CONFIG, max_unread_tokens=4)) as engine:
        with stepped(engine, monkeypatch) as gate:
            stream = engine.submit(request)
            events = []
            while not stream.is_complete:
                gate.step()
                if stream.num_unread:
                    events.append(next(iter(stream)))
        assert sum((event.token_ids for event in events), ()) == answers(request)
        assert events[-1].finish.reason is FinishReason.LENGTH
        assert max(engine._runtime.num_steps) == 4


def planned(*params, num_pages=64, num_more_waiting=0, max_unread_tokens=1000):
    """Bursts, and a plan of decode steps of requests with these parameters."""
    scheduler = Dispatcher(1, num_pages, 16, sum(one.n for one in params), 64)
    for index, one in enumerate((*params, *[SamplingParams(max_tokens=9)] * num_more_waiting)):
        request = Request(prompt_ids=(1, 2, 3), params=one)
        for sequence in new_group(request, TokenStream("", one.n), index, None).sequences:
            scheduler.add(sequence)
    assert scheduler.schedule(0.0).has_prefill
    return Bursts(scheduler, max_unread_tokens), scheduler.schedule(0.0)


LONG = SamplingParams(max_tokens=100)


@pytest.mark.parametrize(
    ("seconds", "num_steps"), [(0.001, 8), (0.012, 8), (0.019, 5), (0.045, 2), (0.051, 1), (1.0, 1)]
)
def test_a_burst_is_as_long_as_fits_the_time(seconds, num_steps):
    bursts, plan = planned(LONG, LONG)
    assert bursts.extended(plan, BUCKET).num_steps == 1, "no time is known yet"
    bursts.note(BUCKET, 2, 2 * seconds)
    assert bursts.extended(plan, BUCKET).num_steps == num_steps


def test_one_slow_launch_does_not_end_bursts():
    bursts, plan = planned(LONG)
    for seconds in (*[0.01] * 50, 0.05):
        bursts.note(BUCKET, 1, seconds)
    assert bursts.extended(plan, BUCKET).num_steps == 6


def test_each_bucket_has_its_own_time():
    bursts, plan = planned(LONG)
    bursts.note(replace(BUCKET, num_rows=1, num_tokens=1), 1, 0.001)
    assert bursts.extended(plan, BUCKET).num_steps == 1


@pytest.mark.parametrize(
    "others",
    [
        SamplingParams(max_tokens=100, min_tokens=50),
        SamplingParams(max_tokens=100, bad_words=((4, 5),)),
        SamplingParams(max_tokens=2),
    ],
)
def test_a_row_that_the_host_must_see_after_each_step_has_all_make_one(others):
    bursts, plan = planned(LONG, others)
    bursts.note(BUCKET, 1, 0.001)
    assert bursts.extended(plan, BUCKET) == plan
    assert plan.num_steps == 1


def test_after_its_least_tokens_a_row_goes_on_as_others():
    bursts, plan = planned(SamplingParams(max_tokens=100, min_tokens=3))
    bursts.note(BUCKET, 1, 0.001)
    lengths = []
    while len(lengths) < 4:
        lengths.append(bursts.extended(plan, BUCKET).num_steps)
        plan = bursts._scheduler.schedule(0.0)
    # One is sampled with the prompt; the third and what comes before it may not be an end.
    assert lengths == [1, 1, 8, 8]


def test_no_row_samples_more_than_it_may():
    bursts, plan = planned(LONG, SamplingParams(max_tokens=5))
    bursts.note(BUCKET, 1, 0.001)
    # One is sampled with the prompt.
    assert bursts.extended(plan, BUCKET).num_steps == 4
    assert [row.sequence.num_unsampled for row in plan.rows] == [95, 0]


def test_while_a_request_waits_there_is_one_step_at_a_time():
    bursts, plan = planned(LONG, num_more_waiting=1)
    bursts.note(BUCKET, 1, 0.001)
    assert bursts.extended(plan, BUCKET).num_steps == 1


@pytest.mark.parametrize(
    ("num_unread", "num_steps"), [(0, 8), (12, 8), (13, 7), (18, 2), (19, 1), (20, 1)]
)
def test_no_reader_lags_too_far_after_a_burst(num_unread, num_steps):
    bursts, plan = planned(LONG, LONG, max_unread_tokens=20)
    bursts.note(BUCKET, 1, 0.001)
    stream = plan.rows[0].sequence.group.stream
    stream.put(TokenEvent(index=0, token_ids=(1,) * num_unread))
    assert bursts.extended(plan, BUCKET).num_steps == num_steps


def test_completions_of_one_request_share_what_its_reader_may_lag():
    bursts, plan = planned(replace(LONG, n=3), LONG, max_unread_tokens=20)
    bursts.note(BUCKET, 1, 0.001)
    assert [row.sequence.index for row in plan.rows] == [0, 1, 2, 0]
    assert bursts.extended(plan, BUCKET).num_steps == 6


def test_without_free_pages_for_all_steps_there_is_one():
    bursts, plan = planned(SamplingParams(max_tokens=12), num_pages=1)
    bursts.note(BUCKET, 1, 0.001)
    assert bursts.extended(plan, BUCKET).num_steps == 8
    bursts, plan = planned(*[replace(LONG, max_tokens=40)] * 2, num_pages=2)
    bursts.note(BUCKET, 1, 0.001)
    for _ in range(9):
        plan = bursts._scheduler.schedule(0.0)
    assert plan.rows[0].start == 12
    before = [row.sequence.num_computed for row in plan.rows]
    assert bursts.extended(plan, BUCKET).num_steps == 1
    assert [row.sequence.num_computed for row in plan.rows] == before


@pytest.mark.skipif(not best_instructions(), reason="this installation has no bodies for the CPU")
@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(data=2, model=2)], ids=str)
def test_a_model_answers_as_it_does_step_by_step(engines, rng, monkeypatch, mesh):
    config = replace(CONFIG, quantize=(("", "q8_0"),), mesh=mesh)
    requests = [
        Request(
            prompt_ids=random_prompt(rng, int(rng.integers(1, 40))),
            params=replace(random_params(rng, 40), bad_words=(), seed=7),
        )
        for _ in range(20)
    ]
    monkeypatch.setattr(bursts, "LONGEST_S", 0.0)
    with engines.fresh(config) as engine:
        single = [engine.generate([one]) for one in requests]
        most = {bucket.max_steps for bucket in engine._runtime.programs.buckets}
        assert most == {1, bursts.MAX_STEPS}
        lengths = []
        launch = engine._runtime.run
        layouts = engine._runtime.layouts

        def recorded(bucket, words):
            lengths.append(int(layouts[bucket].views(words[0])["num_steps"]))
            return launch(bucket, words)

        monkeypatch.setattr(engine._runtime, "run", recorded)
        monkeypatch.setattr(bursts, "LONGEST_S", 1e9)
        several = [engine.generate([one]) for one in requests]
    assert max(lengths) == bursts.MAX_STEPS
    for ours, theirs in zip(several, single, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == other.logprobs
            assert one.finish.reason is other.finish.reason
