"""What goes wrong on the way ends the requests it must, with the right code, and nothing else."""

import threading
from dataclasses import replace

import pytest

from pallasite.engine import ErrorCode, Request, RequestError, SamplingParams
from tests.engine.answers import assert_same_answers
from tests.engine.harness import (
    TIGHT,
    assert_quiet,
    greedy,
    lively_tensors,
    one_by_one,
    random_prompt,
    stepped,
    tokens,
)
from tests.tiny_checkpoints import TINY, write_hf

PLACES = {
    "planning": (lambda engine: engine._scheduler.pools[0], "allocate"),
    "filling the batch": (lambda engine: engine._stepper._builder, "build"),
    "choosing a program": (lambda engine: engine._runtime, "bucket_for"),
    "the step": (lambda engine: engine._runtime, "run"),
    "reading the results": (lambda engine: engine._committer, "commit"),
    "giving leases back": (lambda engine: engine._leases, "collect"),
}


def read(stream):
    events = list(stream)
    return tuple(i for event in events for i in event.token_ids), events[-1].finish


def fail_once(engine, place, monkeypatch):
    """Makes one call at a place raise; returns the event that says it has."""
    find_owner, name = PLACES[place]
    owner = find_owner(engine)
    call = getattr(owner, name)
    has_failed = threading.Event()

    def fail(*arguments):
        if has_failed.is_set():
            return call(*arguments)
        has_failed.set()
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(owner, name, fail)
    return has_failed


@pytest.mark.parametrize("repetition_penalty", [0.01, 100.0])
@pytest.mark.parametrize("penalty", [-100.0, 100.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 100.0])
def test_no_accepted_parameters_make_logits_overflow(
    engine, rng, repetition_penalty, penalty, temperature
):
    prompt = random_prompt(rng, 20)
    params = SamplingParams(
        max_tokens=8,
        temperature=temperature,
        logit_bias={prompt[0]: 1000.0, prompt[1]: -1000.0},
        repetition_penalty=repetition_penalty,
        presence_penalty=penalty,
        frequency_penalty=penalty,
        ignore_eos=True,
    )
    [completion] = engine.generate([Request(prompt_ids=prompt, params=params)])
    assert completion.finish.error is None
    assert len(completion.token_ids) == 8


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory):
    """Finite weights whose logits are infinite after token 5 and nowhere else.

    Width 0 of the residual stream is 1,000 for that token and 0 for all others in every layer; the
    head multiplies it by nearly the largest f32.
    """
    tensors = lively_tensors()
    tensors["model.embed_tokens.weight"][:, 0] = 0
    tensors["model.embed_tokens.weight"][5, 0] = 1000
    tensors["lm_head.weight"][7, 0] = 3e38
    for layer in range(TINY.num_layers):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{name}.weight"][0] = 0
    return write_hf(tmp_path_factory.mktemp("broken") / "model", TINY, tensors)


def test_logits_that_are_not_finite_end_that_request_alone(engines, broken_model, rng):
    with engines.fresh(checkpoint=broken_model) as engine:
        prompts = [tuple(i for i in random_prompt(rng, 40) if i != 5) for _ in range(4)]
        good = [greedy(p, max_tokens=12, bad_words=((5,),)) for p in prompts]
        whole = tokens(one_by_one(engine, good))
        bad = greedy((*prompts[0], 5), max_tokens=12)
        scored = greedy((5, *prompts[0]), max_tokens=12, bad_words=((5,),), ignore_eos=True)
        ended = engine.generate([*good, bad, *good, scored])
        assert tokens(ended[:4]) == tokens(ended[5:9]) == whole
        assert ended[4].token_ids == ()
        assert ended[4].finish.error.code is ErrorCode.INTERNAL
        assert "not finite" in str(ended[4].finish.error)
        assert len(ended[9].token_ids) > 0, "token 5 harms no place but its own"
        assert_quiet(engine)
        assert tokens(engine.generate(good)) == whole, "its pages are used again, harmlessly"


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_ends_what_is_in_flight_and_the_engine_goes_on(engine, rng, monkeypatch, place):
    requests = [
        greedy(random_prompt(rng, 20 + i), max_tokens=12, presence_penalty=0.1, ignore_eos=True)
        for i in range(14)
    ]
    whole = tokens(engine.generate(requests))
    compilations = engine.metrics.compilations
    held = engine.prefill(requests[0], 30.0)
    list(held)
    with stepped(engine, monkeypatch) as loop:
        running = [engine.submit(request) for request in requests[:4]]
        loop.step(4)
        waiting = [engine.submit(request) for request in requests[4:]]
        loop.step(1)
        has_failed = fail_once(engine, place, monkeypatch)
    ends = [read(stream) for stream in (*running, *waiting)]
    assert has_failed.is_set()
    num_failed = 0
    for request, (ids, finish), answer in zip(requests, ends, whole, strict=True):
        assert_same_answers([request], [ids], [answer[: len(ids)]])
        if finish.error is None:
            assert len(ids) == len(answer)
        else:
            num_failed += 1
            assert finish.error.code is ErrorCode.UNAVAILABLE
            assert finish.error.retry_after_s == 1.0
            assert "RuntimeError" in str(finish.error)
            assert "the device is gone" not in str(finish.error), "what broke is for the log"
    assert 4 <= num_failed <= 8, "those with a slot and no others"
    with pytest.raises(RequestError, match="lost with a failed step") as caught:
        engine.decode(held.handle.handle_id, engine.epoch, "", None)
    assert caught.value.code is ErrorCode.FAILED_PRECONDITION
    assert_quiet(engine)
    assert_same_answers(requests, tokens(engine.generate(requests)), whole)
    assert engine.metrics.is_alive
    assert engine.metrics.compilations == compilations, "a new cache needs no new program"


def test_a_decode_asked_for_while_a_step_fails_reads_no_lost_page(engine, rng, monkeypatch):
    request = greedy(random_prompt(rng, 40), max_tokens=12, ignore_eos=True)
    [whole] = tokens(engine.generate([request]))
    held = engine.prefill(request, 30.0)
    [first] = held
    with stepped(engine, monkeypatch) as loop:
        other = engine.submit(greedy(random_prompt(rng, 20), max_tokens=30, ignore_eos=True))
        loop.step(3)
        decoded = engine.decode(held.handle.handle_id, engine.epoch, "", None)
        fail_once(engine, "the step", monkeypatch)
    assert read(other)[1].error.code is ErrorCode.UNAVAILABLE
    ids, finish = read(decoded)
    assert finish.error is None
    assert_same_answers([request], [first.token_ids + ids], [whole])


def test_a_request_that_cannot_be_prepared_ends_alone_and_writes_to_no_page(
    engines, rng, monkeypatch
):
    # Four slots and few pages: what a slot held before is soon another's.
    engine = engines.get(TIGHT)
    build, strays = engine._stepper._builder.build, []

    def watch(plan, *arguments):
        strays.extend(
            row for row in plan.rows if len(row.sequence.pages) * 16 < row.start + row.num_tokens
        )
        return build(plan, *arguments)

    monkeypatch.setattr(engine._stepper._builder, "build", watch)
    crowd = [greedy(random_prompt(rng, 55), max_tokens=25, ignore_eos=True) for _ in range(3)]
    engine.generate([*crowd, crowd[0]])
    whole = tokens(engine.generate(crowd))
    edit, num_failed = engine._runtime.edit, 0

    def fail(slot_edit, shard):
        nonlocal num_failed
        num_failed += 1
        raise OverflowError("a value that no array holds")

    with stepped(engine, monkeypatch) as loop:
        streams = [engine.submit(request) for request in crowd]
        loop.step(20)
        monkeypatch.setattr(engine._runtime, "edit", fail)
        odd = [
            engine.submit(greedy(random_prompt(rng, 14), max_tokens=1, presence_penalty=1.0))
            for _ in range(18)
        ]
        loop.step(20)
        monkeypatch.setattr(engine._runtime, "edit", edit)
    for stream in odd:
        ids, finish = read(stream)
        assert ids == ()
        assert finish.error.code is ErrorCode.INTERNAL
        assert "no array holds" not in str(finish.error)
    assert num_failed == 18
    assert strays == [], "nobody computes tokens that they have no page for"
    assert_same_answers(crowd, [read(stream)[0] for stream in streams], whole)


def test_an_engine_whose_steps_all_fail_gives_up_and_ends_everything(engines, rng, monkeypatch):
    with engines.fresh() as engine:

        def fail(*arguments):
            raise RuntimeError("for good")

        monkeypatch.setattr(engine._runtime, "run", fail)
        request = greedy(random_prompt(rng, 9), max_tokens=9)
        with stepped(engine, monkeypatch):
            streams = [engine.submit(request) for _ in range(40)]
        for stream in streams:
            ids, finish = read(stream)
            assert ids == ()
            assert finish.error.code is ErrorCode.UNAVAILABLE
        engine._thread.join(60)
        assert not engine.metrics.is_alive
        with pytest.raises(RequestError) as caught:
            engine.submit(greedy([1], max_tokens=1))
        assert caught.value.code is ErrorCode.UNAVAILABLE
        assert engine.audit().problems == ()


def test_an_engine_that_cannot_recover_ends_everything_and_says_it_is_dead(
    engines, rng, monkeypatch
):
    with engines.fresh() as engine:

        def fail(*arguments):
            raise MemoryError("no room for another cache")

        monkeypatch.setattr(engine._runtime, "run", fail)
        monkeypatch.setattr(engine._runtime, "reset", fail)
        request = greedy(random_prompt(rng, 9), max_tokens=9)
        with stepped(engine, monkeypatch):
            streams = [engine.submit(request) for _ in range(40)]
        for stream in streams:
            assert read(stream)[1].error.code is ErrorCode.UNAVAILABLE
        engine._thread.join(60)
        assert not engine.metrics.is_alive
        with pytest.raises(RequestError) as caught:
            engine.submit(greedy([1], max_tokens=1))
        assert caught.value.code is ErrorCode.UNAVAILABLE


def test_what_is_counted_from_many_threads_is_counted_once(engine, rng):
    before = replace(engine.metrics)
    request = greedy(random_prompt(rng, 7), max_tokens=1, ignore_eos=True)
    barrier = threading.Barrier(8)

    def call():
        barrier.wait()
        for _ in range(25):
            list(engine.submit(request))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert_quiet(engine)
    assert engine.metrics.num_requests - before.num_requests == 200
    assert engine.metrics.prompt_tokens - before.prompt_tokens == 1400
    assert engine.metrics.generation_tokens - before.generation_tokens == 200
