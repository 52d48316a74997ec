"""Adapters over gRPC, on the real engine: who asks for one gets its tokens, and nobody else."""

import asyncio
from types import SimpleNamespace

import grpc
import pytest

from pallasite.engine.config import EngineConfig
from pallasite.engine.engine import Engine
from pallasite.engine.request import Request
from pallasite.engine.request import SamplingParams as EngineParams
from pallasite.proto import admin_pb2 as pb
from pallasite.proto import inference_pb2
from pallasite.server.client import AsyncClient, Client, RetryPolicy, SamplingParams
from pallasite.server.client_messages import chat_prompt
from tests.engine.harness import held_open, lively_tensors
from tests.peft_adapters import Peft
from tests.server.serving import ids_of, refused, serving_engine
from tests.tiny_checkpoints import TINY, write_hf

GREEDY = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
PROMPTS = [list(b"the quick brown fox"), list(b"jumps"), list(b"over the lazy dog") * 3]
MESSAGES = [{"role": "user", "content": "hello"}]
KEYS = {"alice": "a" * 20, "bob": "b" * 20}
ROOM, RANK = 2, 8

NOT_FOUND = grpc.StatusCode.NOT_FOUND
TAKEN = grpc.StatusCode.FAILED_PRECONDITION
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("models") / "tiny", TINY, lively_tensors())


@pytest.fixture(scope="module")
def shared_engine(folder, compile_cache):
    config = EngineConfig(
        weights="f32",
        max_requests=4,
        max_batch_tokens=32,
        max_adapters=ROOM,
        max_adapter_rank=RANK,
        compile_cache=compile_cache,
    )
    with Engine.load(folder, config) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine):
    """The engine without adapters; whatever a test loads goes with it."""
    yield shared_engine
    for name in shared_engine.adapter_names():
        shared_engine.unload_adapter(name)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of adapters, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: Peft(tensors=lively_tensors(), rank=4, seed=seed).write(folder / name)
        for seed, name in enumerate(("one", "two", "three"))
    }


def load(s, name, folder):
    return s.admin.LoadAdapter(pb.LoadAdapterRequest(name=name, folder=str(folder)))


def unload(s, name):
    return s.admin.UnloadAdapter(pb.UnloadAdapterRequest(name=name))


def asked_directly(engine, prompts, adapter):
    """The engine's own tokens."""
    params = EngineParams(**GREEDY)
    requests = [Request(prompt_ids=tuple(p), params=params, adapter=adapter) for p in prompts]
    return [list(completion.token_ids) for completion in engine.generate(requests)]


async def test_every_way_gives_the_adapters_own_tokens(engine, folder, adapters):
    sampling = SamplingParams(**GREEDY)

    async def in_two(client, prompt, name):
        first = await client.prefill(prompt, sampling, adapter=name)
        return [*first.event.token_ids, *await ids_of(client.decode(first.handle))]

    async with serving_engine(engine, folder) as s:
        base = asked_directly(engine, PROMPTS, "")
        for name in ("one", "two"):
            await load(s, name, adapters[name])
        expected = {name: asked_directly(engine, PROMPTS, name) for name in ("", "one", "two")}
        asked = [(prompt, name) for prompt in PROMPTS for name in expected]
        streams = [ids_of(s.client.generate(p, sampling, adapter=name)) for p, name in asked]
        streamed = await asyncio.gather(*streams)
        halves = await asyncio.gather(*[in_two(s.client, *pair) for pair in asked])
        flat = [expected[name][PROMPTS.index(prompt)] for prompt, name in asked]
    assert streamed == flat
    assert halves == flat
    assert expected[""] == base
    for left, right in (("", "one"), ("", "two"), ("one", "two")):
        assert all(a != b for a, b in zip(expected[left], expected[right], strict=True))


async def test_scores_are_the_adapters_own(engine, folder, adapters):
    params = EngineParams(max_tokens=1, temperature=0.0, logprobs=3, prompt_logprobs=3)
    prompt = PROMPTS[0]
    async with serving_engine(engine, folder) as s:
        await load(s, "one", adapters["one"])
        scored = {}
        for name in ("", "one"):
            request = Request(prompt_ids=tuple(prompt), params=params, adapter=name)
            (completion,) = engine.generate([request])
            places = [*completion.prompt_logprobs[1:], *completion.logprobs]
            scores = await s.client.score(prompt, top=3, adapter=name)
            assert list(scores.logprobs) == pytest.approx(
                [place.logprob for place in places[:-1]], abs=1e-5
            )
            assert [list(top.token_ids) for top in scores.top] == [
                [token_id for token_id, _ in place.top] for place in places
            ]
            scored[name] = list(scores.logprobs)
    differences = [abs(a - b) for a, b in zip(scored[""], scored["one"], strict=True)]
    assert min(differences) > 1e-4, "an adapter of every matrix changes every score"


async def test_both_clients_name_adapters(engine, folder, adapters):
    sampling = SamplingParams(**GREEDY)
    prompt = PROMPTS[0]

    def blocking(address):
        def ids(stream):
            return [token_id for event in stream for token_id in event.token_ids]

        with Client(address, policy=RetryPolicy(max_attempts=1)) as client:
            first = client.prefill(prompt, sampling, adapter="one")
            return {
                "info": list(client.model_info().adapters),
                "generate": ids(client.generate(prompt, sampling, adapter="one")),
                "chat": ids(client.chat(MESSAGES, sampling, adapter="one")),
                "prefill": [*first.event.token_ids, *ids(client.decode(first.handle))],
                "score": list(client.score(prompt, adapter="one").logprobs),
            }

    async def waiting(client):
        first = await client.prefill(prompt, sampling, adapter="one")
        return {
            "info": list((await client.model_info()).adapters),
            "generate": await ids_of(client.generate(prompt, sampling, adapter="one")),
            "chat": await ids_of(client.chat(MESSAGES, sampling, adapter="one")),
            "prefill": [*first.event.token_ids, *await ids_of(client.decode(first.handle))],
            "score": list((await client.score(prompt, adapter="one")).logprobs),
        }

    async with serving_engine(engine, folder) as s:
        await load(s, "one", adapters["one"])
        answers = await asyncio.to_thread(blocking, s.server.address), await waiting(s.client)
        chat = await s.client.tokenize(chat_prompt(MESSAGES))
        plain_score = list((await s.client.score(prompt)).logprobs)
        expected, answer = asked_directly(engine, [prompt, chat], "one")
        assert [expected, answer] != asked_directly(engine, [prompt, chat], "")
    for answered in answers:
        assert answered["info"] == ["one"]
        assert answered["generate"] == answered["prefill"] == expected
        assert answered["chat"] == answer
        assert answered["score"] == pytest.approx(answers[0]["score"], abs=1e-5)
        assert answered["score"] != pytest.approx(plain_score, abs=1e-3)


async def test_model_info_tells_the_room_and_who_is_in_it(engine, folder, adapters):
    async with serving_engine(engine, folder) as s:

        async def info():
            answer = await s.client.model_info()
            assert (answer.max_adapters, answer.max_adapter_rank) == (ROOM, RANK)
            return list(answer.adapters)

        assert await info() == []
        await load(s, "two", adapters["two"])
        await load(s, "one", adapters["one"])
        assert await info() == ["two", "one"]
        await unload(s, "two")
        assert await info() == ["one"]


async def test_an_adapter_that_is_not_loaded_is_named(engine, folder, adapters):
    async with serving_engine(engine, folder) as s:
        await load(s, "one", adapters["one"])
        await load(s, "two", adapters["two"])
        await unload(s, "two")
        for name in ("two", "One", "/etc"):
            calls = (
                ("adapter", ids_of(s.client.generate("ab", adapter=name))),
                ("request.adapter", s.client.prefill("ab", adapter=name)),
                ("adapter", s.client.score("ab", adapter=name)),
                ("name", unload(s, name)),
            )
            for field, call in calls:
                fields, message = await refused(call, NOT_FOUND)
                assert fields == [field]
                assert f"got {name!r}, which is not loaded; loaded are: one;" in message
        fields, _ = await refused(unload(s, ""), NOT_FOUND)
        assert fields == ["name"]
        # Not set and set to nothing mean the same.
        request = inference_pb2.GenerateRequest(
            text="ab", adapter="", sampling=SamplingParams(**GREEDY)
        )
        ids = await ids_of(s.inference.Generate(request))
        assert ids == asked_directly(engine, [list(b"ab")], "")[0]


def cut_short(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def other_json(folder):
    (folder / "adapter_config.json").write_text("{")


def no_config(folder):
    (folder / "adapter_config.json").unlink()


def no_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def weights_are_a_folder(folder):
    no_weights(folder)
    (folder / "adapter_model.safetensors").mkdir()


DAMAGES = {
    cut_short: "adapter_model.safetensors",
    other_json: "adapter_config.json that is not valid JSON",
    no_config: "'adapter_config.json', which cannot be read",
    no_weights: "'adapter_model.safetensors', which cannot be read",
    weights_are_a_folder: "'adapter_model.safetensors', which cannot be read",
}
UNFIT = {
    "adapter of rank 9; at most 8 is allowed": {"rank": 9},
    "peft_type='LOHA'": {"settings": {"peft_type": "LOHA"}},
    "scales beyond the floats": {"settings": {"lora_alpha": 1e300}},
}


async def test_a_folder_that_cannot_be_loaded_is_the_field_at_fault(
    engine, folder, adapters, tmp_path
):
    cases = []
    for damage, message in DAMAGES.items():
        damaged = Peft(tensors=lively_tensors()).write(tmp_path / damage.__name__)
        damage(damaged)
        cases.append((damaged, message))
    for number, (message, peft) in enumerate(UNFIT.items()):
        unfit = Peft(**{"tensors": lively_tensors(), **peft}).write(tmp_path / str(number))
        cases.append((unfit, message))
    cases += [
        (tmp_path / "missing", "'adapter_config.json', which cannot be read"),
        (adapters["one"] / "adapter_config.json", "'adapter_config.json', which cannot be read"),
        (f"{tmp_path}\0", "got no folder, or a NUL in its name"),
        ("", "got no folder"),
    ]
    async with serving_engine(engine, folder) as s:
        await load(s, "one", adapters["one"])
        for place, message in cases:
            fields, details = await refused(load(s, "odd", place))
            assert fields == ["folder"], place
            assert message in details
            assert str(tmp_path) not in details
            assert str(adapters["one"].parent) not in details
        assert list((await s.client.model_info()).adapters) == ["one"]
        # What was refused took no room.
        await load(s, "odd", adapters["two"])
        answer = await ids_of(s.client.generate([1, 2], SamplingParams(**GREEDY), adapter="odd"))
        assert [answer] == asked_directly(engine, [[1, 2]], "odd")


async def test_a_name_that_cannot_be_given_is_the_field_at_fault(engine, folder, adapters):
    async with serving_engine(engine, folder) as s:
        await load(s, "one", adapters["one"])
        fields, message = await refused(load(s, "one", adapters["two"]), TAKEN)
        assert fields == ["name"]
        assert "got 'one', which is loaded" in message
        for name in ("", "x" * 129, "a\tb"):
            fields, message = await refused(load(s, name, adapters["two"]))
            assert fields == ["name"]
            assert f"got a name of {len(name)} characters" in message
        await load(s, "é" * 128, adapters["two"])
        assert engine.adapter_names() == ["one", "é" * 128]
        assert asked_directly(engine, PROMPTS, "one") != asked_directly(engine, PROMPTS, "é" * 128)


async def test_there_is_room_again_where_an_adapter_and_its_requests_have_gone(
    engine, folder, adapters
):
    sampling = SamplingParams(**GREEDY)
    async with serving_engine(engine, folder) as s:
        await load(s, "one", adapters["one"])
        await load(s, "two", adapters["two"])
        fields, message = await refused(load(s, "three", adapters["three"]), FULL)
        assert fields == []
        assert f"all {ROOM} slots are in use (2 loaded)" in message
        expected = asked_directly(engine, PROMPTS[:1], "one")[0]
        held = await s.client.prefill(PROMPTS[0], sampling, adapter="one")
        await unload(s, "one")
        # The name has gone, what a lease still needs has not.
        _, message = await refused(load(s, "three", adapters["three"]), FULL)
        assert f"all {ROOM} slots are in use (1 loaded)" in message
        rest = await ids_of(s.client.decode(held.handle))
        assert [*held.event.token_ids, *rest] == expected
        await load(s, "three", adapters["three"])
        # A name is free for another adapter.
        await unload(s, "two")
        await load(s, "one", adapters["two"])
        assert asked_directly(engine, PROMPTS[:1], "one")[0] != expected


async def test_streams_go_on_while_adapters_come_and_go(engine, folder, adapters, monkeypatch):
    long = {**GREEDY, "max_tokens": 490}
    async with serving_engine(engine, folder) as s:
        await load(s, "one", adapters["one"])
        params = EngineParams(**long)
        prompts = [tuple(PROMPTS[0])] * 2
        requests = [
            Request(prompt_ids=prompt, params=params, adapter=name)
            for prompt, name in zip(prompts, ("one", ""), strict=True)
        ]
        expected = [list(completion.token_ids) for completion in engine.generate(requests)]
        sampling = SamplingParams(**long)
        streams = [aiter(s.client.generate(PROMPTS[0], sampling, adapter=n)) for n in ("one", "")]
        with held_open(engine, monkeypatch, 490):
            firsts = [list((await anext(stream)).token_ids) for stream in streams]
            await unload(s, "one")
            await load(s, "two", adapters["two"])
            await unload(s, "two")
            await load(s, "one", adapters["three"])
            assert engine.current_load().num_running == 2
        rests = [await ids_of(stream) for stream in streams]
    assert [first + rest for first, rest in zip(firsts, rests, strict=True)] == expected


async def test_an_engine_without_room_says_how_to_get_some(folder, adapters, compile_cache):
    config = EngineConfig(
        weights="f32", max_requests=2, max_batch_tokens=16, compile_cache=compile_cache
    )
    with Engine.load(folder, config) as engine:
        async with serving_engine(engine, folder) as s:
            for place in (adapters["one"], adapters["one"] / "missing"):
                fields, message = await refused(load(s, "one", place), TAKEN)
                assert fields == []
                assert "without room for any" in message
                assert "start it with --max-adapters N" in message
            answer = await s.client.model_info()
            assert (list(answer.adapters), answer.max_adapters) == ([], 0)


async def test_tenants_share_adapters_and_nothing_else(engine, folder, adapters):
    sampling = SamplingParams(**GREEDY)
    async with (
        serving_engine(engine, folder, api_keys=KEYS, api_key=KEYS["alice"]) as s,
        AsyncClient(
            s.server.address, api_key=KEYS["bob"], policy=RetryPolicy(max_attempts=1)
        ) as bob,
    ):
        await load(s, "one", adapters["one"])
        await load(s, "two", adapters["two"])
        clients = SimpleNamespace(alice=s.client, bob=bob)
        asked = [
            (getattr(clients, tenant), prompt, name)
            for tenant in ("alice", "bob")
            for prompt in PROMPTS
            for name in ("", "one", "two")
        ]
        expected = {name: asked_directly(engine, PROMPTS, name) for name in ("", "one", "two")}
        answers = await asyncio.gather(
            *[ids_of(client.generate(p, sampling, adapter=name)) for client, p, name in asked]
        )
        assert answers == [expected[name][PROMPTS.index(prompt)] for _, prompt, name in asked]
        held = await s.client.prefill(PROMPTS[0], sampling, adapter="one")
        await refused(ids_of(bob.decode(held.handle)), grpc.StatusCode.PERMISSION_DENIED)
        rest = await ids_of(s.client.decode(held.handle))
        assert [*held.event.token_ids, *rest] == expected["one"][0]
        await unload(s, "one")
        for client in (s.client, bob):
            await refused(ids_of(client.generate("ab", sampling, adapter="one")), NOT_FOUND)
