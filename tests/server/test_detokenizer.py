"""Streams of random ids against the whole decode, cut at the stop string by plain search."""

import random
import time
from contextlib import closing

import pytest

from pallasite.engine.errors import RequestError
from pallasite.engine.request import SamplingParams
from pallasite.server.chat_template import ChatTemplate
from pallasite.server.config import TextLimits
from pallasite.server.detokenizer import Detokenizer, TextDelta
from pallasite.server.generate import TextEngine
from pallasite.server.prompts import PromptEncoder
from pallasite.server.text_request import Prompt, TextRequest
from tests.server.fake_engine import FakeEngine
from tests.server.tiny_tokenizers import byte_level, sentencepiece

NUM_STREAMS = 2000
TOKENIZERS = {"bytes": byte_level(), "pieces": sentencepiece()}
# What may follow some bytes: enough to turn every cut character into a whole one.
CONTINUATIONS = [b"a", *(bytes([byte]) * 3 + b"a" for byte in (0x80, 0x90, 0xA0, 0xBF))]


def _first_match(text: str, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Returns (end, stop string) of the match that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return end, max(ending, key=len)
    return None


def _final_text(tokenizer, ids, skips_special) -> str:
    """Returns the text of the ids that no later id can change."""
    skipped = tokenizer.special_ids if skips_special else ()
    raw = b"".join(tokenizer.token_bytes(i) for i in ids if i not in skipped)
    texts = [(raw + more).decode(errors="replace") for more in CONTINUATIONS]
    texts += [raw.decode(errors="replace")]
    columns = enumerate(zip(*texts, strict=False))
    num_same = next((i for i, chars in columns if len(set(chars)) > 1), min(map(len, texts)))
    text = texts[0][:num_same]
    return text.removeprefix(" ") if tokenizer.strips_leading_space else text


def _random_ids(rng: random.Random, tokenizer) -> list[int]:
    sources = [
        lambda: tokenizer.encode(
            rng.choice(["hello world", "é", "👩‍👩", " a", "数学", "\u200bab", "lo", "  "]),
            adds_special_tokens=False,
        ),
        lambda: [rng.randrange(tokenizer.vocab_size)],
        lambda: [rng.choice(sorted(tokenizer.special_ids))],
    ]
    return [i for _ in range(rng.randrange(14)) for i in rng.choices(sources, [6, 3, 1])[0]()]


def _random_stop(rng: random.Random, text: str) -> tuple[str, ...]:
    """Returns up to four stop strings, mostly cut out of the text, some nearly in it."""
    stop = []
    for _ in range(rng.randrange(5)):
        start = rng.randrange(len(text) + 1)
        part = text[start : start + rng.randrange(1, 7)]
        stop.append(rng.choice([part, part[::-1], part + "l", "lo", "\ufffd", "a"]) or "x")
    return tuple(stop)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_random_streams_equal_the_whole_decode_cut_at_the_stop(kind, request):
    seed = f"{request.config.option.hypothesis_seed}/{kind}"
    rng = random.Random(seed)
    tokenizer = TOKENIZERS[kind]
    num_matches = num_late_matches = 0
    for _ in range(NUM_STREAMS // 2):
        skips_special, includes_stop = rng.random() < 0.5, rng.random() < 0.5
        ids = _random_ids(rng, tokenizer)
        whole = tokenizer.decode(ids, skips_special=skips_special)
        stop = _random_stop(rng, whole)
        match = _first_match(whole, stop)
        expected = whole
        if match is not None:
            expected = whole[: match[0] - (0 if includes_stop else len(match[1]))]

        detokenizer = Detokenizer(tokenizer, stop, includes_stop, skips_special)
        text, matched, num_tokens, place = "", None, 0, 0
        while place < len(ids):
            chunk = ids[place : place + rng.randrange(4)]
            place += len(chunk)
            delta = detokenizer.push(chunk)
            text += delta.text
            num_tokens += delta.num_tokens
            if delta.matched is not None:
                matched = delta.matched
                assert detokenizer.push([0, 1]) == TextDelta(text="", matched=None, num_tokens=0)
                break
            final = _final_text(tokenizer, ids[:place], skips_special)
            held = max((n for s in stop for n in range(len(s)) if final.endswith(s[:n])), default=0)
            assert text == final[: len(final) - held], (seed, ids, stop)
        end = detokenizer.finish()
        text += end.text
        num_late_matches += end.matched is not None
        matched = matched or end.matched
        num_matches += matched is not None

        assert text == expected, (seed, ids, stop)
        assert matched == (None if match is None else match[1]), (seed, ids, stop)
        completing = (
            n
            for n in range(len(ids) + 1)
            if match and len(_final_text(tokenizer, ids[:n], skips_special)) >= match[0]
        )
        assert num_tokens == next(completing, len(ids)), (seed, ids, stop)
        assert end.num_tokens == 0
        assert detokenizer.finish() == TextDelta(text="", matched=None, num_tokens=0)
    assert num_matches > NUM_STREAMS // 10
    assert num_late_matches > 0


def _push_all(detokenizer: Detokenizer, *chunks: list[int]) -> list[tuple[str, str | None, int]]:
    deltas = [detokenizer.push(chunk) for chunk in chunks]
    return [(delta.text, delta.matched, delta.num_tokens) for delta in deltas]


def _ids(text: str) -> list[int]:
    return [TOKENIZERS["bytes"].encode(char, adds_special_tokens=False)[0] for char in text]


def test_a_stop_string_across_tokens_is_cut_and_the_tokens_behind_it_do_not_count():
    detokenizer = Detokenizer(TOKENIZERS["bytes"], ("cde",), False, True)
    assert _push_all(detokenizer, _ids("abc"), _ids("d"), _ids("efg")) == [
        ("ab", None, 3),
        ("", None, 1),
        ("", "cde", 1),
    ]
    assert detokenizer.finish().text == ""


def test_held_text_is_released_where_it_is_no_stop_and_at_the_end():
    detokenizer = Detokenizer(TOKENIZERS["bytes"], ("aab",), True, True)
    assert _push_all(detokenizer, _ids("aa"), _ids("a"), _ids("c"), _ids("xa")) == [
        ("", None, 2),
        ("a", None, 1),
        ("aac", None, 1),
        ("x", None, 2),
    ]
    assert detokenizer.finish() == TextDelta(text="a", matched=None, num_tokens=0)


@pytest.mark.parametrize(
    ("stop", "text", "matched"),
    [
        (("bc", "abcd"), "xa", "bc"),
        (("c", "bc", "abc"), "x", "abc"),
        (("abcd", "zbc"), "x", "abcd"),
    ],
)
def test_the_stop_string_complete_first_wins_then_the_longest(stop, text, matched):
    detokenizer = Detokenizer(TOKENIZERS["bytes"], stop, False, True)
    delta = detokenizer.push(_ids("xabcde"))
    assert (delta.text, delta.matched) == (text, matched)


def test_half_a_character_waits_and_becomes_one_replacement_at_the_end():
    ids = TOKENIZERS["bytes"].encode("🙂", adds_special_tokens=False)
    assert len(ids) == 4
    detokenizer = Detokenizer(TOKENIZERS["bytes"], (), False, True)
    assert _push_all(detokenizer, ids[:3], ids[3:]) == [("", None, 3), ("🙂", None, 1)]
    detokenizer = Detokenizer(TOKENIZERS["bytes"], (), False, True)
    assert _push_all(detokenizer, ids[:3]) == [("", None, 3)]
    assert detokenizer.finish().text == "\ufffd"


def test_bytes_that_can_become_no_character_do_not_wait():
    tokenizer = TOKENIZERS["pieces"]
    first_byte = tokenizer.encode("\0", adds_special_tokens=False)[-1]
    assert tokenizer.token_bytes(first_byte) == b"\0"
    for lead, second, text in [
        (0xED, 0xA0, "\ufffd" * 2),
        (0xED, 0x9F, ""),
        (0xC0, 0x80, "\ufffd" * 2),
    ]:
        detokenizer = Detokenizer(tokenizer, (), False, True)
        assert detokenizer.push([first_byte + lead, first_byte + second]).text == text


@pytest.mark.parametrize("stop", [("a", ""), ("\ud800",)])
def test_a_stop_string_that_cannot_be_is_refused(stop):
    with pytest.raises(RequestError) as caught:
        Detokenizer(TOKENIZERS["bytes"], stop, False, True)
    assert caught.value.field == "stop"


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="got token id 9999"):
        Detokenizer(TOKENIZERS["bytes"], (), False, True).push([9999])


def test_a_token_costs_the_same_whatever_is_held_back():
    """20,000 tokens, with 10,000 characters held back most of the time."""
    detokenizer = Detokenizer(TOKENIZERS["bytes"], ("a" * 10_000 + "b",), False, True)
    ids = _ids("a") * 20_000
    start = time.process_time()
    text = "".join(detokenizer.push([token_id]).text for token_id in ids)
    assert time.process_time() - start < 2.0
    assert len(text) == 10_000
    assert len(detokenizer.finish().text) == 10_000


@pytest.mark.parametrize("continues_text", [False, True])
def test_the_space_of_a_first_word_is_the_texts_own_where_it_goes_on(continues_text):
    tokenizer = TOKENIZERS["pieces"]
    ids = tokenizer.encode("hello hello", adds_special_tokens=True)
    detokenizer = Detokenizer(tokenizer, (), False, True, continues_text=continues_text)
    text = "".join(detokenizer.push([token_id]).text for token_id in ids)
    assert text == (" hello hello" if continues_text else "hello hello")
    assert tokenizer.decode(ids, skips_special=True) == "hello hello"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (Prompt(text="a"), " a a"),
        (Prompt(token_ids=(274,)), " a a a a"),
        (Prompt(messages=({"role": "user", "content": "a"},)), "a a a a"),
    ],
)
async def test_a_text_goes_on_with_its_space_and_an_answer_begins_without(prompt, text):
    tokenizer = TOKENIZERS["pieces"]
    assert tokenizer.token_text(274) == "\u2581a"
    template = ChatTemplate("{{ messages[0].content }}", tokenizer)
    encoder = PromptEncoder(tokenizer, template, TextLimits())
    with closing(FakeEngine()) as engine, closing(encoder):
        text_engine = TextEngine(engine, encoder, model_name="tiny")
        request = TextRequest(prompt=prompt, params=SamplingParams(max_tokens=4))
        with closing(await text_engine.generate(request)) as stream:
            events = [event.text async for event in stream]
    assert "".join(events) == text
