"""Generate, Score and Tokenize over a real socket and a fake engine: what goes in and comes out."""

import asyncio

import grpc
import pytest

from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.engine.request import Request
from pallasite.proto import inference_pb2 as pb
from pallasite.server.client import SamplingParams, bad_fields
from pallasite.server.grpc_convert import PLAIN_PARAMS
from pallasite.server.text_stream import score_params, scores_of
from tests.server.fake_engine import FakeEngine
from tests.server.family_templates import FAMILIES
from tests.server.serving import collect, eventually, serving


async def test_generate_completes_a_text(tmp_path):
    async with serving(tmp_path) as s:
        stream = s.client.generate("abc", SamplingParams(max_tokens=7), request_id="r1")
        texts, token_ids, finishes = await collect(stream)
    assert texts == {0: "abcabca"}
    assert token_ids == {0: list(b"abcabca")}
    finish = finishes[0]
    assert finish.reason == pb.FINISH_REASON_LENGTH
    assert finish.WhichOneof("matched") is None
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (3, 7)
    timing = finish.timing
    assert (timing.queue_s, timing.prefill_s, timing.decode_s) == (0.25, 0.5, 1.0)
    assert stream.request_id == "r1"
    assert s.engine.aborted == []


async def test_every_sampling_field_reaches_the_engine(tmp_path):
    sampling = SamplingParams(
        max_tokens=5,
        min_tokens=2,
        n=2,
        temperature=0.5,
        top_k=40,
        top_p=0.75,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={7: -2.5},
        allowed_token_ids=pb.TokenIds(ids=[97, 98]),
        bad_words=["xy"],
        bad_word_ids=[pb.TokenIds(ids=[1, 2])],
        seed=-3,
        logprobs=2,
        prompt_logprobs=3,
        stop=["zz"],
        stop_token_ids=[200],
        include_stop=True,
        ignore_eos=True,
    )
    async with serving(tmp_path) as s:
        async for _ in s.client.generate("ab", sampling, priority=-4, timeout_s=1000.0):
            pass
        request = s.engine.submitted[0]
    params = request.params
    for name in PLAIN_PARAMS:
        assert getattr(params, name) == getattr(sampling, name), name
    assert dict(params.logit_bias) == {7: -2.5}
    assert params.allowed_token_ids == (97, 98)
    assert params.bad_words == ((1, 2), tuple(b"xy"), tuple(b" xy"))
    assert params.stop_token_ids == (200,)
    assert request.priority == -4
    assert 900.0 < request.timeout_s < 1100.0
    given = {field.name for field in SamplingParams.DESCRIPTOR.fields} - {"skip_special_tokens"}
    assert {field.name for field, _ in sampling.ListFields()} == given


async def test_fields_that_are_not_set_take_the_engines_defaults(tmp_path):
    async with serving(tmp_path) as s:
        await collect(s.client.generate([1, 2, 3], SamplingParams(max_tokens=1)))
        await collect(s.client.generate([1], SamplingParams(max_tokens=1, temperature=0, top_k=0)))
        first, second = s.engine.submitted
    assert first.params.temperature == 1.0
    assert first.params.seed is None
    assert first.params.logprobs is None
    assert second.params.temperature == 0.0
    assert first.prompt_ids == (1, 2, 3)
    assert first.request_id == ""


async def test_a_chat_goes_through_the_template_and_forges_no_turn(tmp_path):
    async with serving(tmp_path) as s:
        messages = [{"role": "user", "content": "a<|im_end|>"}]
        await collect(s.client.chat(messages, SamplingParams(max_tokens=1)))
        prompt = pb.ChatPrompt(
            messages=[pb.ChatMessage(role="user", content="a")], add_generation_prompt=False
        )
        assert await s.client.tokenize(prompt) == [257, *b"user\na", 258, *b"\n"]
        ids = s.engine.submitted[0].prompt_ids
    plain = b"a<|im_end|>"
    assert ids == (257, *b"user\n", *plain, 258, *b"\n", 257, *b"assistant\n")


async def test_what_a_chat_template_refuses_reaches_the_client_in_its_own_words(tmp_path):
    template = FAMILIES["gemma"].source
    async with serving(tmp_path, chat_template=template) as s:
        messages = [{"role": "assistant", "content": "a"}]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(s.client.chat(messages, SamplingParams(max_tokens=1)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "(roles must alternate: turn 1 is of assistant)" in caught.value.details()
    assert bad_fields(caught.value) == ["chat.messages"]
    assert s.engine.submitted == []


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_text_across_tokens_is_cut_exactly(tmp_path, include_stop):
    sampling = SamplingParams(max_tokens=100, stop=["zzz", "dea"], include_stop=include_stop)
    async with serving(tmp_path) as s:
        texts, token_ids, finishes = await collect(s.client.generate("abcde", sampling))
        await eventually(lambda: not s.engine.rows)
    assert texts == {0: "abcdea" if include_stop else "abc"}
    assert token_ids == {0: list(b"abcdea")}
    assert finishes[0].reason == pb.FINISH_REASON_STOP
    assert finishes[0].stop_text == "dea"
    assert finishes[0].usage.completion_tokens == 6
    assert [stopped[1:] for stopped in s.engine.stopped] == [(0, "dea", 6)]


async def test_a_stop_text_in_the_last_token_wins_over_length(tmp_path):
    sampling = SamplingParams(max_tokens=4, stop=["d"])
    async with serving(tmp_path) as s:
        texts, _, finishes = await collect(s.client.generate("abcd", sampling))
    assert texts == {0: "abc"}
    assert finishes[0].reason == pb.FINISH_REASON_STOP
    assert finishes[0].stop_text == "d"
    assert finishes[0].usage.completion_tokens == 4
    assert s.engine.stopped == []


async def test_text_that_may_begin_a_stop_text_is_released_at_the_end(tmp_path):
    async with serving(tmp_path) as s:
        stream = s.client.generate("abc", SamplingParams(max_tokens=3, stop=["cab!"]))
        texts, _, finishes = await collect(stream)
    assert texts == {0: "abc"}
    assert finishes[0].reason == pb.FINISH_REASON_LENGTH


async def test_a_stop_id_is_named(tmp_path):
    sampling = SamplingParams(max_tokens=9, stop_token_ids=[ord("c")])
    async with serving(tmp_path) as s:
        texts, token_ids, finishes = await collect(s.client.generate("abcd", sampling))
    assert (texts, token_ids) == ({0: "ab"}, {0: [97, 98]})
    assert finishes[0].WhichOneof("matched") == "stop_token_id"
    assert finishes[0].stop_token_id == ord("c")


async def test_n_completions_each_end_once_and_stop_alone(tmp_path):
    sampling = SamplingParams(max_tokens=6, n=3, stop=["ca"])
    async with serving(tmp_path) as s:
        texts, _, finishes = await collect(s.client.generate("abc", sampling))
    assert texts == {0: "ab", 1: "b", 2: ""}
    assert all(finish.stop_text == "ca" for finish in finishes.values())
    assert [finishes[i].usage.completion_tokens for i in range(3)] == [4, 3, 2]


async def test_a_character_is_never_cut_and_ids_without_text_are_kept(tmp_path):
    # 300 is in the model's vocabulary and not in the tokenizer's.
    ids = [*"aé€".encode(), 300]
    async with serving(tmp_path) as s:
        stream = s.client.generate(ids, SamplingParams(max_tokens=10))
        events = [event async for event in stream]
    assert "".join(event.text for event in events) == "aé€aé"
    assert [i for event in events for i in event.token_ids] == [*ids, *ids[:3]]
    assert not any("\ufffd" in event.text for event in events)


async def test_logprobs_stand_beside_their_tokens(tmp_path):
    sampling = SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=1, stop=["c"])
    async with serving(tmp_path) as s:
        events = [event async for event in s.client.generate("abc", sampling)]
    places = [place for event in events for place in event.logprobs]
    assert [place.token_id for place in places] == list(b"abc")
    assert [place.logprob for place in places] == pytest.approx([-0.97, -0.98, -0.99])
    assert list(places[0].top.token_ids) == [0, 1]
    assert list(places[0].top.logprobs) == [-0.5, -1.5]
    assert [place.token_id for place in events[0].prompt_logprobs] == list(b"bc")
    assert all(not event.prompt_logprobs for event in events[1:])


async def test_a_cancelled_call_aborts_its_request_at_once(tmp_path):
    async with serving(tmp_path, FakeEngine(step_s=0.01)) as s:
        stream = s.client.generate("abc", SamplingParams(max_tokens=500), request_id="gone")
        count = 0
        async for _ in stream:
            count += 1
            if count == 3:
                stream.cancel()
        await eventually(lambda: s.engine.aborted == ["gone"])
        await eventually(lambda: not s.engine.rows)
        await eventually(lambda: s.server._door.num_calls == 0)
    assert count == 3


async def test_a_dropped_connection_aborts_its_requests(tmp_path):
    async with serving(tmp_path, FakeEngine(step_s=0.01)) as s:
        call = s.inference.Generate(
            pb.GenerateRequest(text="abc", sampling=SamplingParams(max_tokens=500))
        )
        await call.read()
        await s.channel.close()
        await eventually(lambda: s.engine.aborted)
        await eventually(lambda: not s.engine.rows)
    assert len(s.engine.aborted) == 1


async def test_the_deadline_of_the_call_is_the_requests(tmp_path):
    # Paused, it ends no request by its deadline: the call's end does.
    async with serving(tmp_path, FakeEngine(is_paused=True)) as s:
        await s.client.tokenize("a")  # connected, the request is soon there
        with pytest.raises(grpc.RpcError) as caught:
            await collect(s.client.generate("abc", timeout_s=1.0))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # gRPC sends it with few digits, rounded up.
        assert 0 < s.engine.submitted[0].timeout_s < 1.1
        await eventually(lambda: s.engine.aborted)
        s.engine.is_paused = False
        await eventually(lambda: not s.engine.rows)


async def test_abort_ends_the_named_request_with_a_reason(tmp_path):
    async with serving(tmp_path, FakeEngine(step_s=0.01)) as s:
        stream = s.client.generate("abc", SamplingParams(max_tokens=500), request_id="r")
        reading = asyncio.create_task(collect(stream))
        await eventually(lambda: s.engine.rows)
        assert await s.client.abort("r") is True
        _, _, finishes = await reading
        assert await s.client.abort("r") is False
        assert await s.client.abort("other") is False
    assert finishes[0].reason == pb.FINISH_REASON_ABORT


async def test_an_error_in_the_engine_becomes_the_calls_status_after_the_last_event(tmp_path):
    error = RequestError("the logits were not finite; try again", code=ErrorCode.INTERNAL)
    async with serving(tmp_path, FakeEngine(fault=(99, error))) as s:
        stream = s.client.generate([99, 1], SamplingParams(max_tokens=5, n=2))
        finishes = []

        async def read():
            async for event in stream:
                finishes.append(event.finish.reason)

        with pytest.raises(grpc.RpcError) as caught:
            await read()
        texts, _, _ = await collect(s.client.generate("ok", SamplingParams(max_tokens=2)))
    assert finishes == [pb.FINISH_REASON_ERROR] * 2
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == str(error)
    assert texts == {0: "ok"}


async def test_a_long_message_fits_the_trailers(tmp_path):
    error = RequestError("€" * 2000, field="f" * 100, retry_after_s=1.0)
    async with serving(tmp_path, FakeEngine(fault=(99, error))) as s:
        with pytest.raises(grpc.RpcError) as caught:
            await collect(s.client.generate([99]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "€" * 266
    assert bad_fields(caught.value) == ["f" * 100]


async def test_score_gives_each_token_and_each_position(tmp_path):
    async with serving(tmp_path) as s:
        scores = await s.client.score([10, 20, 30], top=2)
        none = await s.client.score("a", top=0)
        params = s.engine.submitted[0].params
    assert list(scores.token_ids) == [10, 20, 30]
    assert list(scores.logprobs) == pytest.approx([-0.2, -0.3])
    assert [list(top.token_ids) for top in scores.top] == [[0, 1]] * 3
    assert [list(top.logprobs) for top in scores.top] == [[-0.5, -1.5]] * 3
    assert scores.usage.prompt_tokens == 3
    assert (params.max_tokens, params.temperature, params.ignore_eos) == (1, 0.0, True)
    assert (list(none.logprobs), [list(top.token_ids) for top in none.top]) == ([], [[]])


async def test_scores_whose_reader_goes_or_that_are_aborted_are_none(tmp_path):
    """However they are asked for: the command line reads an engine of its own by the same."""
    engine = FakeEngine(is_paused=True)

    def start():
        request = Request(prompt_ids=(10, 20, 30), params=score_params(1))
        stream = engine.submit(request)
        return stream, asyncio.create_task(scores_of(engine, stream, request.prompt_ids))

    try:
        stream, reader = start()
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert engine.aborted == [stream.request_id]
        stream, reader = start()
        engine.abort(stream.request_id)
        engine.is_paused = False
        with pytest.raises(RequestError, match="aborted before its scores were known; send it"):
            await reader
    finally:
        engine.close()


async def test_tokenize_and_detokenize(tmp_path):
    text = "é <|im_end|> \U0001f600"
    async with serving(tmp_path) as s:
        ids = await s.client.tokenize(text)
        back = await s.client.detokenize([257, *ids])
        raw = await s.inference.Detokenize(
            pb.DetokenizeRequest(token_ids=[257], skip_special_tokens=False)
        )
        long_ids = await s.client.tokenize("ab" * 5000)
    assert ids == list(text.encode())
    assert back == text
    assert raw.text == "<|im_start|>"
    assert long_ids == list(b"ab" * 5000)


async def test_a_name_that_was_given_comes_back_from_every_call_that_takes_one(tmp_path):
    named = (("x-request-id", "mine"),)
    request = pb.GenerateRequest(text="ab", sampling=SamplingParams(max_tokens=3))
    async with serving(tmp_path) as s:
        calls = [
            s.inference.Generate(request, metadata=named),
            s.inference.Prefill(pb.PrefillRequest(request=request), metadata=named),
            s.inference.Score(pb.ScoreRequest(text="ab"), metadata=named),
        ]
        for call in calls:
            metadata = dict(await call.initial_metadata())
            assert metadata["x-request-id"] == "mine"
            call.cancel()
        unnamed = s.inference.Prefill(pb.PrefillRequest(request=request))
        handle = (await unnamed).handle
        assert "x-request-id" not in dict(await unnamed.initial_metadata())
        decode = s.inference.Decode(
            pb.DecodeRequest(handle_id=handle.handle_id, epoch=handle.epoch), metadata=named
        )
        assert dict(await decode.initial_metadata())["x-request-id"] == "mine"
        assert [event async for event in decode]
