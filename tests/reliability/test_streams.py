"""Text as it streams: nothing is lost, cut in two or said twice."""

import asyncio

from pallasite.engine import Request
from pallasite.engine import SamplingParams as EngineParams
from pallasite.server.client import SamplingParams
from pallasite.server.tokenizer import load_tokenizer
from tests.engine.answers import assert_allowed
from tests.engine.harness import random_prompt
from tests.tiny_checkpoints import TINY

CHARACTERS = "é€a"
NUM_AT_ONCE = 20


async def read(stream):
    """Text, token ids and finishes, by completion."""
    texts, token_ids, finishes = {}, {}, {}
    async for event in stream:
        assert event.index not in finishes, "nothing follows a finish"
        event.text.encode()  # a lone surrogate would raise
        texts[event.index] = texts.get(event.index, "") + event.text
        token_ids.setdefault(event.index, []).extend(event.token_ids)
        if event.HasField("finish"):
            finishes[event.index] = event.finish
    assert texts.keys() == finishes.keys()
    return texts, token_ids, finishes


async def test_deltas_are_the_text_and_stop_texts_are_cut_exactly(
    engine, engines, door, rng, repetitions, figures
):
    count = repetitions(60, 2500)  # each is streamed twice
    tokenizer = load_tokenizer(engines.checkpoint)
    # Bytes of characters of one to three bytes, in any order: most texts have broken characters
    # and whole ones.
    some_bytes = sorted({*CHARACTERS.encode()})
    num_stopped = num_split = num_whole = num_ties = 0

    def fields(number):
        bias = {} if number % 4 == 0 else dict.fromkeys(some_bytes, 9.0)
        return {
            "max_tokens": 40,
            "n": 1 + number % 3,
            "seed": number,
            "logit_bias": bias,
            "ignore_eos": True,
        }

    async def stream_twice(client, number):
        nonlocal num_stopped, num_split, num_whole, num_ties
        prompt = list(random_prompt(rng, int(rng.integers(1, 40))))
        whole = client.generate(prompt, SamplingParams(**fields(number)))
        texts, token_ids, finishes = await read(whole)
        assert texts.keys() == set(range(1 + number % 3))
        for index, text in texts.items():
            known = [i for i in token_ids[index] if i < tokenizer.vocab_size]
            assert text == tokenizer.decode(known, skips_special=True)
            assert len(token_ids[index]) == finishes[index].usage.completion_tokens == 40
            num_split += "\ufffd" in text
            num_whole += any(character in text for character in CHARACTERS[:2])
        text = texts[0]
        if len(text) < 8:
            return
        start = int(rng.integers(2, len(text) - 3))
        stop = text[start : start + int(rng.integers(1, 5))]
        stops = ["never said", stop]
        again = client.generate(prompt, SamplingParams(**fields(number), stop=stops))
        cut_texts, cut_ids, cut_finishes = await read(again)
        request = Request(prompt_ids=tuple(prompt), params=EngineParams(**fields(number)))
        for index, text in texts.items():
            if cut_ids[index] != token_ids[index][: len(cut_ids[index])]:
                assert_allowed(request, cut_ids[index], index)
                assert_allowed(request, token_ids[index], index)
                num_ties += 1
                text = tokenizer.decode(
                    [i for i in cut_ids[index] if i < tokenizer.vocab_size], skips_special=True
                )
            assert cut_texts[index] == text.partition(stop)[0]
            if stop in text:
                num_stopped += 1
                assert cut_finishes[index].stop_text == stop
                used = tokenizer.decode(
                    [i for i in cut_ids[index] if i < tokenizer.vocab_size], skips_special=True
                )
                assert stop in used, "the tokens are those up to the end of the stop text"

    async with door(engine) as client:
        for first in range(0, count, NUM_AT_ONCE):
            numbers = range(first, min(first + NUM_AT_ONCE, count))
            await asyncio.gather(*[stream_twice(client, number) for number in numbers])
    assert TINY.vocab_size > tokenizer.vocab_size, "some ids have no text"
    assert num_stopped > count // 2
    assert num_ties <= 1 + count // 50
    assert min(num_split, num_whole) > count // 4  # of about two texts a stream
    figures(
        streams=2 * count,
        cut_by_a_stop_text=num_stopped,
        with_whole_characters=num_whole,
        with_broken_ones=num_split,
        differences=0,
        ties=num_ties,
    )
