"""gRPC over the real engine, on a tiny model: the same tokens by every way, and no page lost."""

import asyncio
import random
from contextlib import asynccontextmanager

import grpc
import pytest

from pallasite.engine.config import EngineConfig
from pallasite.engine.engine import Engine
from pallasite.engine.request import Request
from pallasite.engine.request import SamplingParams as EngineParams
from pallasite.server.client import SamplingParams
from pallasite.server.tokenizer import load_tokenizer
from tests.engine.harness import stepped
from tests.server.serving import eventually, ids_of, serving_engine
from tests.tiny_checkpoints import TINY, random_tensors, write_hf

GREEDY = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("models") / "tiny", TINY, random_tensors(TINY))


@pytest.fixture(scope="module")
def engine(folder, compile_cache):
    config = EngineConfig(
        weights="f32", max_requests=4, max_batch_tokens=32, compile_cache=compile_cache
    )
    engine = Engine.load(folder, config)
    yield engine
    engine.close()


@asynccontextmanager
async def client_of(engine, folder):
    """A client of a server over the engine."""
    async with serving_engine(engine, folder) as s:
        yield s.client


async def test_every_way_gives_the_offline_tokens(engine, folder):
    prompts = [[random.Random(i).randrange(256) for _ in range(1 + 9 * i)] for i in range(8)]
    params = EngineParams(**GREEDY)
    offline = engine.generate(
        [Request(prompt_ids=tuple(prompt), params=params) for prompt in prompts]
    )
    expected = [list(completion.token_ids) for completion in offline]
    sampling = SamplingParams(**GREEDY)

    async def in_two(client, prompt):
        first = await client.prefill(prompt, sampling)
        return [*first.event.token_ids, *await ids_of(client.decode(first.handle))]

    async with client_of(engine, folder) as client:
        streamed = await asyncio.gather(*[ids_of(client.generate(p, sampling)) for p in prompts])
        halves = await asyncio.gather(*[in_two(client, prompt) for prompt in prompts])
        stop = await client.detokenize(expected[0][5:7])
        stopped = [
            e async for e in client.generate(prompts[0], SamplingParams(**GREEDY, stop=[stop]))
        ]
    assert streamed == expected
    assert halves == expected
    assert all(len(ids) == 24 for ids in expected)
    text = "".join(event.text for event in stopped)
    whole = load_tokenizer(folder).decode([i for i in expected[0] if i < 259], skips_special=True)
    assert text == whole[: whole.index(stop)]
    assert stopped[-1].finish.stop_text == stop
    count = sum(len(event.token_ids) for event in stopped)
    assert stopped[-1].finish.usage.completion_tokens == count


async def test_scores_are_those_of_the_engine(engine, folder):
    prompt = list(b"the quick brown fox jumps over the lazy dog")
    params = EngineParams(
        max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=5, prompt_logprobs=5
    )
    (completion,) = engine.generate([Request(prompt_ids=tuple(prompt), params=params)])
    async with client_of(engine, folder) as client:
        scores = await client.score(prompt)
    places = [*completion.prompt_logprobs[1:], *completion.logprobs]
    assert list(scores.logprobs) == pytest.approx(
        [place.logprob for place in places[:-1]], abs=1e-6
    )
    assert [list(top.token_ids) for top in scores.top] == [[i for i, _ in p.top] for p in places]
    assert len(scores.top) == len(prompt)
    assert scores.top[-1].token_ids[0] == completion.token_ids[0]


async def test_cancelled_and_aborted_requests_leave_nothing(engine, folder, rng):
    rng = random.Random(int(rng.integers(2**32)))
    sampling = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)

    async def leave(client, number):
        prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 120))]
        name = f"request-{number}"
        stream = client.generate(prompt, sampling, request_id=name)
        reading = asyncio.create_task(ids_of(stream))
        await asyncio.sleep(rng.random() * 0.1)
        if number % 2:
            stream.cancel()
        else:
            await client.abort(name)
        await reading

    async with client_of(engine, folder) as client:
        expected = await ids_of(client.generate([7, 8, 9], sampling))
        witness = asyncio.create_task(ids_of(client.generate([7, 8, 9], sampling)))
        for batch in range(8):
            await asyncio.gather(*[leave(client, 10 * batch + i) for i in range(10)])
        assert await witness == expected


async def test_prefills_that_nobody_decodes_give_their_pages_back(engine, folder):
    sampling = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    async with client_of(engine, folder) as client:
        released = await client.prefill([1], sampling)
        handles = [(await client.prefill([i], sampling, lease_s=0.3)).handle for i in range(1, 30)]
        assert engine.audit().leased > 0
        await client.release(released.handle)
        await eventually(lambda: engine.audit().leased == 0)
        with pytest.raises(grpc.RpcError) as caught:
            await ids_of(client.decode(handles[0]))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_requests_whose_deadline_passed_in_the_queue_compute_nothing(
    engine, folder, monkeypatch
):
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    before = engine.metrics.generation_tokens
    async with client_of(engine, folder) as client:
        with stepped(engine, monkeypatch) as loop:
            busy = [asyncio.create_task(ids_of(client.generate([i], long))) for i in range(1, 9)]
            await eventually(lambda: engine.current_load().num_waiting == 8)
            loop.step(3)
            assert engine.current_load().num_running == 4
            late = [ids_of(client.generate([9] * 50, long, timeout_s=0.05)) for _ in range(20)]
            ends = await asyncio.gather(*late, return_exceptions=True)
        codes = {end.code() for end in ends if isinstance(end, grpc.RpcError)}
        assert len(ends) == 20
        assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert all(len(ids) == 400 for ids in await asyncio.gather(*busy))
    assert engine.metrics.generation_tokens - before == 8 * 400
