"""Tokenizers of both kinds, from GGUF, against the library's own parts and plain algorithms."""

import itertools
import subprocess
import sys
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from pallasite.engine.errors import ConfigError, RequestError
from pallasite.models.gguf_file import GgufFile
from pallasite.server.config import TextLimits
from pallasite.server.prompts import PromptEncoder
from pallasite.server.tokenizer import Tokenizer, load_tokenizer
from pallasite.server.tokenizer_gguf import build_from_gguf
from tests.server.tiny_tokenizers import (
    CONTROL,
    SPECIALS,
    USER_DEFINED,
    byte_level,
    byte_level_metadata,
    sentencepiece,
    sentencepiece_metadata,
)

BYTE_LEVEL = byte_level()
SENTENCEPIECE = sentencepiece()
PRE_TOKENIZERS = {
    pre: build_from_gguf(byte_level_metadata(pre)).encoder.pre_tokenizer
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "default")
}
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            [*SPECIALS, "<unk>", "<0x41>", "hello", " world", "123", "é", "👩‍👩‍👧", "\r\n", "  "]
        ),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "pieces"])
@given(text=TEXTS)
def test_any_text_comes_back_and_holds_no_special_token(tokenizer, text):
    text = text.replace("\u2581", "")
    ids = tokenizer.encode(text, adds_special_tokens=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids, skips_special=False) == text
    assert tokenizer.decode(ids, skips_special=True) == text
    spelled = b"".join(map(tokenizer.token_bytes, ids))
    prefix = b" " if tokenizer is SENTENCEPIECE and text else b""
    assert spelled == prefix + text.encode()


def _join_by_score(text: str) -> list[str]:
    """SentencePiece's own rule: while any neighbours form a piece, join those of the best score."""
    metadata = sentencepiece_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = {
        token: score
        for token, score, kind in zip(
            tokens,
            metadata["tokenizer.ggml.scores"],
            metadata["tokenizer.ggml.token_type"],
            strict=True,
        )
        if kind == 1
    }
    pieces = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        joins = [
            (-scores[left + right], i)
            for i, (left, right) in enumerate(itertools.pairwise(pieces))
            if left + right in scores
        ]
        if not joins:
            return pieces
        _, i = min(joins)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@given(text=st.text(alphabet=" abchelost", min_size=1, max_size=24))
def test_merges_made_from_scores_join_as_sentencepiece_does(text):
    ids = SENTENCEPIECE.encode(text, adds_special_tokens=False)
    assert [SENTENCEPIECE.token_text(i) for i in ids] == _join_by_score(text)


def test_sentencepiece_spells_unknown_characters_in_bytes():
    ids = SENTENCEPIECE.encode("ß", adds_special_tokens=False)
    assert [SENTENCEPIECE.token_text(i) for i in ids] == ["\u2581", "<0xC3>", "<0x9F>"]
    assert [SENTENCEPIECE.token_bytes(i) for i in ids] == [b" ", b"\xc3", b"\x9f"]
    assert SENTENCEPIECE.encode("", adds_special_tokens=False) == []


def test_decoding_drops_one_leading_space_only_where_encoding_put_one():
    hello = SENTENCEPIECE.encode("hello", adds_special_tokens=False)
    assert SENTENCEPIECE.decode(hello * 2, skips_special=True) == "hello hello"
    metadata = sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": False}
    plain = Tokenizer(build_from_gguf(metadata))
    assert plain.decode(hello, skips_special=True) == " hello"
    assert plain.encode(" hello", adds_special_tokens=False) == hello


def test_a_bad_word_is_banned_within_a_word_and_after_a_space():
    encoder = PromptEncoder(SENTENCEPIECE, None, TextLimits())
    with closing(encoder):
        sequences = encoder.bad_word_ids(("abc",), 1)
    texts = [tuple(map(SENTENCEPIECE.token_text, ids)) for ids in sequences]
    assert texts == [("abc",), ("\u2581", "abc")]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["don", "'t", " stop", " 12345", "!!", "\n\n ", " x"]),
        ("smollm", ["don", "'t", " stop", " ", "1", "2", "3", "4", "5", "!!", "\n\n ", " x"]),
        ("llama-bpe", ["don", "'t", " stop", " ", "123", "45", "!!\n\n", " ", " x"]),
        ("qwen2", ["don", "'t", " stop", " ", "1", "2", "3", "4", "5", "!!\n\n", " ", " x"]),
        ("default", ["don", "'", "t", " stop", " ", "123", "45", "!!", "\n\n ", " x"]),
    ],
)
def test_pre_tokenizers_cut_where_their_families_do(pre, expected):
    words = PRE_TOKENIZERS[pre].pre_tokenize_str("don't stop 12345!!\n\n  x")
    byte_map = decoders.ByteLevel()
    assert [byte_map.decode([word]) for word, _ in words] == expected


@given(text=TEXTS)
def test_pre_tokenizers_agree_with_the_librarys_own(text):
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs = {
        "gpt-2": byte,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte]),
    }
    for pre, their in theirs.items():
        ours = PRE_TOKENIZERS[pre]
        assert ours.pre_tokenize_str(text) == their.pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("metadata", "is_bos_added"),
    [
        (byte_level_metadata(), False),
        (byte_level_metadata("llama-bpe"), True),
        (byte_level_metadata() | {"tokenizer.ggml.add_bos_token": True}, True),
        (sentencepiece_metadata(), True),
        (sentencepiece_metadata() | {"tokenizer.ggml.add_bos_token": False}, False),
    ],
)
def test_bos_is_added_as_the_file_or_its_family_says(metadata, is_bos_added):
    tokenizer = Tokenizer(build_from_gguf(metadata))
    bare = tokenizer.encode("hello", adds_special_tokens=False)
    whole = tokenizer.encode("hello", adds_special_tokens=True)
    assert tokenizer.adds_bos == is_bos_added
    assert whole == ([tokenizer.bos_token_id, *bare] if is_bos_added else bare)


def test_gguf_names_every_end():
    named = ("<|im_end|>", "<|eot_id|>")
    assert BYTE_LEVEL.eos_token_ids[:2] == tuple(map(SPECIALS.index, named))
    metadata = byte_level_metadata() | {"tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer(build_from_gguf(metadata))
    assert tokenizer.encode("", adds_special_tokens=True) == [SPECIALS.index("<|im_end|>")]


@pytest.mark.parametrize(
    ("tokens", "kinds"),
    [
        # Gemma's, Phi 3's, Qwen's and Llama 3's ends of a turn; the files name the end of a text.
        (["<end_of_turn>", "</s>"], [CONTROL, USER_DEFINED]),
        (["<|end|>", "<|assistant|>"], [USER_DEFINED, CONTROL]),
        (["<|im_end|>", "<|im_start|>"], [CONTROL, CONTROL]),
        (["<|eot_id|>", "<|end_header_id|>"], [CONTROL, CONTROL]),
    ],
)
def test_the_end_of_a_turn_that_a_gguf_does_not_name_is_known_by_its_text(tokens, kinds):
    metadata = sentencepiece_metadata()
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    end = metadata["tokenizer.ggml.tokens"].index("</s>")
    # The tiny vocabulary has some of them already.
    metadata["tokenizer.ggml.tokens"] = [
        text if i == end or text not in {*tokens, *SPECIALS} else f"[{i}]"
        for i, text in enumerate(metadata["tokenizer.ggml.tokens"])
    ]
    if "</s>" in tokens:
        metadata["tokenizer.ggml.tokens"][end] = "<eos>"
    metadata["tokenizer.ggml.tokens"] += tokens
    metadata["tokenizer.ggml.token_type"] += kinds
    metadata["tokenizer.ggml.scores"] += [-1000.0, -1000.0]
    tokenizer = Tokenizer(build_from_gguf(metadata))
    assert tokenizer.eos_token_ids == (end, num_tokens)
    assert num_tokens in tokenizer.special_ids
    assert tokenizer.special_ids.isdisjoint(
        tokenizer.encode(f"a{tokens[0]}", adds_special_tokens=False)
    )


def test_special_tokens_come_only_from_text_that_is_split():
    text = "<|im_start|>hello<|im_end|><think>"
    pieces = BYTE_LEVEL.split_special(text)
    assert pieces == [1, "hello", 2, "<think>"]
    ids = BYTE_LEVEL.encode_pieces(pieces)
    assert [BYTE_LEVEL.token_text(i) for i in ids] == [
        "<|im_start|>",
        "hello",
        "<|im_end|>",
        "<think>",
    ]
    assert BYTE_LEVEL.decode(ids, skips_special=True) == "hello<think>"
    assert BYTE_LEVEL.decode(ids, skips_special=False) == text
    assert (
        BYTE_LEVEL.decode(BYTE_LEVEL.encode(text, adds_special_tokens=False), skips_special=True)
        == text
    )


@pytest.mark.parametrize("token_id", [-1, BYTE_LEVEL.vocab_size, 2**40])
def test_ids_outside_the_vocabulary_are_refused(token_id):
    with pytest.raises(ValueError, match=f"got token id {token_id}; .* below 279;"):
        BYTE_LEVEL.decode([0, token_id], skips_special=True)
    with pytest.raises(ValueError, match="got token id"):
        BYTE_LEVEL.token_bytes(token_id)


def test_text_without_a_utf8_form_names_its_field():
    with pytest.raises(RequestError, match=r"got U\+D800 at character 1 of text") as caught:
        BYTE_LEVEL.encode("a\ud800", adds_special_tokens=False, field="text")
    assert caught.value.field == "text"


def test_a_character_that_the_vocabulary_lacks_is_refused_and_not_dropped():
    metadata = byte_level_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("Ā")] = "<nothing>"  # stands for the byte 0
    tokenizer = Tokenizer(build_from_gguf(metadata))
    assert tokenizer.encode("he", adds_special_tokens=False) != []
    with pytest.raises(RequestError, match=r"got U\+0000 in prompt"):
        tokenizer.encode("h\0e", adds_special_tokens=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "got tokenizer.ggml.model='bert'; known kinds"),
        ({"tokenizer.ggml.pre": "new"}, "known pre-tokenizers are .*gpt-2, .*llama-bpe.*smollm"),
        ({"tokenizer.ggml.pre": None}, "got nothing for tokenizer.ggml.pre"),
        ({"tokenizer.ggml.pre": 1}, "got a int for tokenizer.ggml.pre"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "1 repeated"),
        ({"tokenizer.ggml.tokens": [1]}, "a int at 0 for tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": []}, "no entries for tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "1 entries for tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.merges": ["h zz"]}, "'h zz' for tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["he"]}, "'he' for tokenizer.ggml.merges"),
        ({"tokenizer.ggml.bos_token_id": 279}, "279 for tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.eot_token_id": -1}, "-1 for tokenizer.ggml.eot_token_id"),
        ({"tokenizer.ggml.add_bos_token": 1}, "a int for tokenizer.ggml.add_bos_token"),
        (
            {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True},
            "got nothing for tokenizer.ggml.bos_token_id; it must be set where add_bos_token is",
        ),
    ],
)
def test_a_damaged_gguf_vocabulary_names_the_key(change, message):
    metadata = byte_level_metadata() | change
    for key in [key for key, value in change.items() if value is None]:
        del metadata[key]
    with pytest.raises(ConfigError, match=message):
        build_from_gguf(metadata)


def test_a_damaged_sentencepiece_vocabulary_names_the_key():
    with pytest.raises(ConfigError, match=r"1 entries for tokenizer\.ggml\.scores"):
        build_from_gguf(sentencepiece_metadata() | {"tokenizer.ggml.scores": [0.0]})
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.token_type"][20] = 1
    with pytest.raises(ConfigError, match="got a SentencePiece vocabulary with 255 byte pieces"):
        build_from_gguf(metadata)


def test_scores_that_order_nothing_are_refused_since_any_order_would_be_a_guess():
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.scores"] = [-1000.0] * len(metadata["tokenizer.ggml.tokens"])
    with pytest.raises(ConfigError, match="joined pieces that all have one score"):
        build_from_gguf(metadata)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scores", float("nan"), "a score that is not finite"),
        ("tokens", "a" * 513, "a piece of 513 characters"),
    ],
)
def test_pieces_that_would_take_long_or_have_no_order_are_refused(key, value, message):
    metadata = sentencepiece_metadata()
    metadata[f"tokenizer.ggml.{key}"][-1] = value
    with pytest.raises(ConfigError, match=message):
        build_from_gguf(metadata)


def test_text_that_a_gguf_wants_changed_before_it_is_encoded_is_refused():
    metadata = sentencepiece_metadata() | {"tokenizer.ggml.remove_extra_whitespaces": True}
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.remove_extra_whitespaces"):
        build_from_gguf(metadata)


def test_a_vocabulary_as_large_as_gemmas_is_built_in_seconds():
    code = (
        "import itertools, resource, time\n"
        "from pallasite.server.tokenizer import Tokenizer\n"
        "from pallasite.server.tokenizer_gguf import build_from_gguf\n"
        "from tests.server.tiny_tokenizers import NORMAL, sentencepiece_metadata\n"
        "metadata = sentencepiece_metadata()\n"
        "tokens = metadata['tokenizer.ggml.tokens']\n"
        "by_length = (itertools.product('abcehlorst', repeat=n) for n in range(2, 7))\n"
        "words = map(''.join, itertools.chain.from_iterable(by_length))\n"
        "known = set(tokens)\n"
        "new = (word for word in words if word not in known)\n"
        "more = [*itertools.islice(new, 262_144 - len(tokens))]\n"
        "metadata['tokenizer.ggml.token_type'] += [NORMAL] * len(more)\n"
        "metadata['tokenizer.ggml.scores'] += [-float(i) for i in range(len(more))]\n"
        "tokens += more\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.process_time()\n"
        "tokenizer = Tokenizer(build_from_gguf(metadata))\n"
        "assert tokenizer.vocab_size == 262_144\n"
        "print(time.process_time() - start)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, mib = map(float, done.stdout.split())
    print(f"262,144 pieces: {seconds:.1f} s of CPU, {mib:.0f} MiB")
    assert seconds < 10
    assert mib < 800


@pytest.fixture(scope="module")
def smollm2(real_model_path):
    return load_tokenizer(real_model_path)


@given(text=TEXTS)
def test_smollm2_brings_any_text_back(smollm2, text):
    # The vocabulary lacks some control characters, and planes 4 to 11.
    lacking = any(char in "\4\6\23\24\26\35" or 0x40000 <= ord(char) < 0xC0000 for char in text)
    if lacking:
        with pytest.raises(RequestError, match="vocabulary has no text token"):
            smollm2.encode(text, adds_special_tokens=True)
    else:
        ids = smollm2.encode(text, adds_special_tokens=True)
        assert smollm2.special_ids.isdisjoint(ids)
        assert smollm2.decode(ids, skips_special=True) == text


def test_smollm2_encodes_as_plain_bpe_over_its_merges_does(smollm2, real_model_path):
    metadata = GgufFile(real_model_path).metadata
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
    ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    text = "The café's 1234 naïve users — “don't” panic!\n\n\tdef f(x): return x**2  # 数学 🙂"
    expected = []
    for word, _ in words.pre_tokenize_str(text):
        parts = list(word)
        while True:
            pairs = [pair for pair in itertools.pairwise(parts) if pair in ranks]
            if not pairs:
                break
            best = min(pairs, key=ranks.__getitem__)
            i = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
            parts[i : i + 2] = ["".join(best)]
        expected += [ids[part] for part in parts]
    assert smollm2.encode(text, adds_special_tokens=True) == expected
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_token_id, smollm2.eos_token_ids, smollm2.adds_bos) == (1, (2, 0), False)
    assert smollm2.special_ids == set(range(17))


def test_smollm2_loads_in_half_a_second_of_cpu_beside_the_engines_imports(real_model_path):
    code = (
        "import sys, time; from pathlib import Path; import pallasite.engine\n"
        "start = time.process_time()\n"
        "from pallasite.server.tokenizer import load_tokenizer\n"
        "load_tokenizer(Path(sys.argv[1]))\n"
        "print(time.process_time() - start)"
    )
    command = [sys.executable, "-c", code, str(real_model_path)]
    seconds = min(
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    )
    assert seconds < 0.5
