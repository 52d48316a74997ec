"""What a call may not say: refused before admission, with a status and the field's name."""

import asyncio
import random

import grpc
import pytest

from pallasite.engine.errors import RequestError
from pallasite.proto import control_pb2
from pallasite.proto import inference_pb2 as pb
from pallasite.server.client import RetryPolicy, SamplingParams, retry_after_s
from pallasite.server.config import TextLimits
from pallasite.server.grpc_messages import parse
from tests.server.fake_engine import FakeEngine
from tests.server.serving import eventually, refused, serving

BAD_SAMPLING = [
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": 2**31 - 1}),
    ("min_tokens", {"max_tokens": 2, "min_tokens": 3}),
    ("n", {"n": 0}),
    ("n", {"n": 17}),
    ("n", {"n": 2**31 - 1}),
    ("temperature", {"temperature": float("nan")}),
    ("temperature", {"temperature": float("inf")}),
    ("temperature", {"temperature": -0.1}),
    ("top_k", {"top_k": -1}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": 1.01}),
    ("min_p", {"min_p": float("nan")}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("presence_penalty", {"presence_penalty": float("-inf")}),
    ("frequency_penalty", {"frequency_penalty": float("nan")}),
    ("logit_bias", {"logit_bias": {320: 1.0}}),
    ("logit_bias", {"logit_bias": {1: float("nan")}}),
    ("logit_bias", {"logit_bias": {-1: 0.0}}),
    ("allowed_token_ids", {"allowed_token_ids": pb.TokenIds()}),
    ("allowed_token_ids", {"allowed_token_ids": pb.TokenIds(ids=[320])}),
    ("bad_words", {"bad_words": [""]}),
    ("bad_words", {"bad_words": ["x" * 257]}),
    ("bad_words", {"bad_words": ["x"] * 65}),
    ("bad_words", {"bad_word_ids": [pb.TokenIds()]}),
    ("logprobs", {"logprobs": 21}),
    ("prompt_logprobs", {"prompt_logprobs": -1}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["x" * 257]}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("stop_token_ids", {"stop_token_ids": [1] * 17}),
]


async def first(stream):
    async for event in stream:
        return event


async def test_every_bad_sampling_field_is_refused_by_name_in_every_method(tmp_path):
    async with serving(tmp_path) as s:
        for name, sampling in BAD_SAMPLING:
            params = SamplingParams(**sampling)
            fields, message = await refused(first(s.client.generate("ab", params)))
            assert fields == [f"sampling.{name}"], (name, sampling)
            assert "got " in message
            fields, _ = await refused(s.client.prefill("ab", params))
            assert fields == [f"request.sampling.{name}"], (name, sampling)
        assert s.engine.submitted == []
        await eventually(lambda: s.server._door.num_calls == 0)


async def test_bad_prompts_are_refused_by_name(tmp_path):
    chat = pb.ChatPrompt
    message = pb.ChatMessage(role="user", content="a")
    limits = TextLimits(max_text_len=600, max_messages=3)
    cases = [
        ("prompt", pb.GenerateRequest()),
        ("text", pb.GenerateRequest(text="")),
        ("text", pb.GenerateRequest(text="x" * 512)),
        ("text", pb.GenerateRequest(text="x" * 601)),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds())),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[320]))),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1]))),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 512))),
        ("chat.messages", pb.GenerateRequest(chat=chat())),
        ("chat.messages", pb.GenerateRequest(chat=chat(messages=[message] * 4))),
        ("chat.messages", pb.GenerateRequest(chat=chat(messages=[pb.ChatMessage(content="a")]))),
        (
            "chat.messages",
            pb.GenerateRequest(
                chat=chat(messages=[pb.ChatMessage(role="user", content="a" * 600)])
            ),
        ),
        (
            "add_special_tokens",
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), add_special_tokens=True),
        ),
        ("x-request-id", pb.GenerateRequest(text="a")),
    ]
    async with serving(tmp_path, text=limits) as s:
        for name, request in cases:
            metadata = (("x-request-id", "r" * 129),) if name == "x-request-id" else None
            call = s.inference.Generate(request, metadata=metadata)
            fields, _ = await refused(call.read())
            assert fields == [name], request
        for name in ("none", "x" * 129, "a\nb"):
            is_name = name == "none"
            code = grpc.StatusCode.NOT_FOUND if is_name else grpc.StatusCode.INVALID_ARGUMENT
            for field, call in (
                ("adapter", first(s.client.generate("ab", adapter=name))),
                ("request.adapter", s.client.prefill("ab", adapter=name)),
                ("adapter", s.client.score("ab", adapter=name)),
            ):
                fields, text = await refused(call, code)
                assert fields == [field]
                assert ("loaded are: none" in text) == is_name
        unknown = pb.GenerateRequest(text="a", model="other")
        fields, text = await refused(
            s.inference.Generate(unknown).read(), grpc.StatusCode.NOT_FOUND
        )
        assert fields == ["model"]
        assert "'tiny'" in text
        assert s.engine.submitted == []


async def test_other_methods_name_their_fields(tmp_path):
    async with serving(tmp_path) as s:
        calls = [
            ("top", s.client.score("ab", top=21)),
            ("top", s.client.score("ab", top=-1)),
            ("text", s.client.score("")),
            ("token_ids", s.client.score([320])),
            ("token_ids", s.client.detokenize([320])),
            ("token_ids", s.client.detokenize([-1])),
            ("prompt", s.inference.Tokenize(pb.TokenizeRequest())),
            ("lease_s", s.client.prefill("ab", lease_s=float("nan"))),
            ("lease_s", s.client.prefill("ab", lease_s=0.0)),
            ("lease_s", s.client.prefill("ab", lease_s=61.0)),
            ("request.sampling.n", s.client.prefill("ab", SamplingParams(n=2))),
        ]
        for name, call in calls:
            fields, _ = await refused(call)
            assert fields == [name]
        answer = await s.client.prefill("ab", SamplingParams(max_tokens=9))
        fields, _ = await refused(s.client.extend_lease(answer.handle, float("inf")))
        assert fields == ["lease_s"]
        unknown = control_pb2.GetModelInfoRequest(model="other")
        await refused(s.control.GetModelInfo(unknown), grpc.StatusCode.NOT_FOUND)


def raw(channel, method):
    """A method of the service that sends bytes as they are."""
    return channel.unary_unary(f"/pallasite.v1.{method}")


async def test_unknown_fields_are_refused_by_path_and_number(tmp_path):
    top = pb.GenerateRequest(text="a").SerializeToString() + bytes([0xF8, 0x07, 1])
    inner = pb.SamplingParams(n=1).SerializeToString() + bytes([0xF8, 0x07, 1])
    nested = bytes([0x22, len(inner)]) + inner + pb.GenerateRequest(text="a").SerializeToString()
    chat_inner = bytes([0x0A, 3, 0xF8, 0x07, 1])
    chat = bytes([0x1A, len(chat_inner)]) + chat_inner
    async with serving(tmp_path) as s:
        generate = raw(s.channel, "Inference/Generate")
        for data, path in [(top, "127"), (nested, "sampling.127"), (chat, "chat.messages.127")]:
            fields, message = await refused(generate(data))
            assert fields == [path]
            assert "127" in message
        fields, _ = await refused(raw(s.channel, "Control/GetLoad")(bytes([0x08, 1])))
        assert fields == ["1"]


async def test_text_that_is_not_utf8_is_refused_by_name(tmp_path):
    odd = b"\xff\xfe"
    message = bytes([0x12, len(odd)]) + odd
    chat = bytes([0x0A, len(message)]) + message
    cases = [
        ("text", bytes([0x0A, len(odd)]) + odd),
        ("chat.messages.content", bytes([0x1A, len(chat)]) + chat),
        ("sampling.stop", bytes([0x22, 5, 0x92, 0x01, 2]) + odd),
        # A lone surrogate, as some languages write it.
        ("text", bytes([0x0A, 3]) + b"\xed\xa0\x80"),
        ("message", bytes([0x0A, 200]) + odd),
        ("message", b"\xff"),
    ]
    async with serving(tmp_path) as s:
        for path, data in cases:
            fields, _ = await refused(raw(s.channel, "Inference/Generate")(data))
            assert fields == [path], data


async def test_an_oversized_message_is_refused(tmp_path):
    async with serving(tmp_path, max_message_bytes=1 << 20) as s:
        generate = raw(s.channel, "Inference/Generate")
        fields, message = await refused(generate(bytes((1 << 20) + 1)))
        assert fields == ["message"]
        assert "1048577" in message
        # gRPC's own limit, at twice ours, keeps the rest out of memory.
        await refused(generate(bytes((2 << 20) + 1)), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert (await first(s.client.generate("ab", SamplingParams(max_tokens=1)))).text == "a"


async def test_random_bytes_never_reach_the_engine_or_break_the_server(tmp_path, rng):
    rng = random.Random(int(rng.integers(2**32)))
    valid = pb.GenerateRequest(
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="hello")]),
        sampling=SamplingParams(max_tokens=2, stop=["a", "b"], logit_bias={1: 2.0}),
    ).SerializeToString()
    allowed = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    methods = ["Generate", "Prefill", "Score", "Tokenize", "ReleaseKv", "Decode"]
    codes = {}

    async def send(data):
        method = rng.choice(methods)
        try:
            if method in ("Generate", "Decode"):
                async for _ in s.channel.unary_stream(f"/pallasite.v1.Inference/{method}")(data):
                    pass
            else:
                await raw(s.channel, f"Inference/{method}")(data)
            code = None
        except grpc.aio.AioRpcError as error:
            code = error.code()
        codes[code] = codes.get(code, 0) + 1

    async with serving(tmp_path, FakeEngine(step_s=0.0002)) as s:
        for _ in range(40):
            batch = []
            for _ in range(10):
                data = bytearray(valid if rng.random() < 0.7 else rng.randbytes(rng.randrange(80)))
                for _ in range(rng.randrange(1, 4)):
                    if data:
                        data[rng.randrange(len(data))] = rng.randrange(256)
                batch.append(send(bytes(data[: rng.randrange(len(data) + 1)])))
            await asyncio.gather(*batch)
        await eventually(lambda: s.server._door.num_calls == 0)
        text = await first(s.client.generate("ab", SamplingParams(max_tokens=1)))
        assert text.text == "a"
    bad = set(codes) - allowed - {None, grpc.StatusCode.FAILED_PRECONDITION}
    assert not bad, codes
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 100


def test_parse_raises_nothing_but_request_errors(rng):
    valid = pb.GenerateRequest(text="é", sampling=SamplingParams(stop=["é"])).SerializeToString()
    num_refused = 0
    for _ in range(3000):
        data = bytearray(valid if rng.random() < 0.5 else rng.bytes(rng.integers(60)))
        for place in rng.integers(len(data), size=2) if data else ():
            data[place] = rng.integers(256)
        for message_type in (pb.GenerateRequest, pb.PrefillRequest, pb.ScoreRequest):
            try:
                parse(message_type, bytes(data), 1 << 20)
                field = "none"
            except RequestError as error:
                field = error.field
                num_refused += 1
            assert field
    assert 3000 < num_refused < 9000


async def test_a_full_queue_says_when_to_come_back(tmp_path):
    engine = FakeEngine()
    engine.is_paused = True
    engine.config = type(engine.config)(max_requests=2, max_waiting=1, max_batch_tokens=64)
    async with serving(tmp_path, engine) as s:
        waiting = [asyncio.create_task(first(s.client.generate("ab"))) for _ in range(3)]
        await eventually(lambda: len(engine.rows) == 3)
        with pytest.raises(grpc.RpcError) as caught:
            await first(s.client.generate("ab"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(caught.value.trailing_metadata())
        assert trailers["grpc-retry-pushback-ms"] == "50"
        del trailers["grpc-retry-pushback-ms"]
        assert retry_after_s(caught.value) == pytest.approx(0.05)
        engine.is_paused = False
        await asyncio.gather(*waiting)


async def test_calls_beyond_the_limit_are_refused_and_health_is_not(tmp_path):
    engine = FakeEngine()
    engine.is_paused = True
    policy = RetryPolicy(max_attempts=1)
    async with serving(tmp_path, engine, max_calls=2, policy=policy) as s:
        waiting = [asyncio.create_task(first(s.client.generate("ab"))) for _ in range(2)]
        await eventually(lambda: len(engine.rows) == 2)
        await refused(first(s.client.generate("ab")), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert await s.client.wait_until_ready(10.0)
        engine.is_paused = False
        await asyncio.gather(*waiting)
        # A stream that its client left ends on the server a little later.
        await eventually(lambda: s.server._door.num_calls == 0)
        assert await s.client.tokenize("a") == [97]
