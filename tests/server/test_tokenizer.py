"""Tokenizers of both kinds and both sources, against the library's own and plain algorithms."""

import itertools
import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from pallasite.engine.errors import ConfigError, RequestError
from pallasite.models.gguf_file import GgufFile
from pallasite.server.tokenizer import Tokenizer, load_tokenizer
from pallasite.server.tokenizer_gguf import build_from_gguf
from tests.server.tiny_tokenizers import (
    SPECIALS,
    byte_level,
    byte_level_metadata,
    sentencepiece,
    sentencepiece_metadata,
)

BYTE_LEVEL = byte_level()
SENTENCEPIECE = sentencepiece()
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
    parts = build_from_gguf(byte_level_metadata(pre))
    words = parts.encoder.pre_tokenizer.pre_tokenize_str("don't stop 12345!!\n\n  x")
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
        ours = build_from_gguf(byte_level_metadata(pre)).encoder.pre_tokenizer
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
    assert BYTE_LEVEL.eos_token_ids == (
        SPECIALS.index("<|im_end|>"),
        SPECIALS.index("<|eot_id|>"),
    )
    metadata = byte_level_metadata() | {"tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer(build_from_gguf(metadata))
    assert tokenizer.encode("", adds_special_tokens=True) == [SPECIALS.index("<|im_end|>")]


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
        ({"tokenizer.ggml.pre": None}, "got a NoneType for tokenizer.ggml.pre"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "1 repeated"),
        ({"tokenizer.ggml.tokens": [1]}, "a int at 0 for tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": []}, "no entries for tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "1 entries for tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.merges": ["h zz"]}, "'h zz' for tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["he"]}, "'he' for tokenizer.ggml.merges"),
        ({"tokenizer.ggml.bos_token_id": 279}, "279 for tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.eot_token_id": -1}, "-1 for tokenizer.ggml.eot_token_id"),
        ({"tokenizer.ggml.add_bos_token": 1}, "a int for tokenizer.ggml.add_bos_token"),
    ],
)
def test_a_damaged_gguf_vocabulary_names_the_key(change, message):
    with pytest.raises(ConfigError, match=message):
        build_from_gguf(byte_level_metadata() | change)


def test_a_damaged_sentencepiece_vocabulary_names_the_key():
    with pytest.raises(ConfigError, match=r"1 entries for tokenizer\.ggml\.scores"):
        build_from_gguf(sentencepiece_metadata() | {"tokenizer.ggml.scores": [0.0]})
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.token_type"][20] = 1
    with pytest.raises(ConfigError, match="255 byte tokens for"):
        build_from_gguf(metadata)


def _save(folder, encoder, **settings):
    encoder.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _llama_encoder(scheme: str) -> tokenizers.Tokenizer:
    """A Llama-2 style tokenizer as Hugging Face writes it."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in [*"\u2581abhelo", "he", "ll", "hell", "hello", "\u2581hello", "\u2581a"]:
        vocab[piece] = len(vocab)
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("\u2581", "hello"),
        ("\u2581", "a"),
    ]
    encoder = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    if scheme == "legacy":
        encoder.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        encoder.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    encoder.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    added = [
        tokenizers.AddedToken("<s>", special=True, normalized=False),
        tokenizers.AddedToken("</s>", special=True, normalized=False, rstrip=True),
        tokenizers.AddedToken("<mask>", special=True, normalized=False, lstrip=True),
    ]
    encoder.add_special_tokens(added)
    encoder.add_tokens([tokenizers.AddedToken("ab", special=False, normalized=False)])
    encoder.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return encoder


@pytest.mark.parametrize("scheme", ["first", "always", "never", "legacy"])
@given(
    text=st.lists(
        st.sampled_from(["<s>", "</s>", "<mask>", "hello", " ", "a", "ab", "ß", "o"]), max_size=8
    ).map("".join)
)
def test_split_text_is_encoded_as_the_library_does_when_it_splits(tmp_path_factory, scheme, text):
    oracle = _llama_encoder(scheme)
    folder = _save(
        tmp_path_factory.mktemp("llama"), _llama_encoder(scheme), bos_token="<s>", eos_token="</s>"
    )
    tokenizer = load_tokenizer(folder)
    expected = oracle.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_pieces(tokenizer.split_special(text)) == expected


def test_a_hugging_face_folder_is_read_whole(tmp_path):
    folder = _save(
        tmp_path,
        _llama_encoder("legacy"),
        bos_token="<s>",
        eos_token={"content": "</s>", "special": True},
        chat_template=[{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}],
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.vocab_size == 3 + 256 + 13 + 2
    assert tokenizer.chat_template == "D"
    assert tokenizer.adds_bos
    assert tokenizer.special_ids == {1, 2, 272}
    ids = tokenizer.encode("hello a", adds_special_tokens=True)
    assert [tokenizer.token_text(i) for i in ids] == ["<s>", "\u2581hello", "\u2581a"]
    assert tokenizer.decode(ids, skips_special=True) == "hello a"
    assert tokenizer.decode(ids, skips_special=False) == "<s> hello a"

    (folder / "config.json").write_text('{"eos_token_id": 1}')
    assert load_tokenizer(folder).eos_token_ids == (1,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    assert load_tokenizer(folder).eos_token_ids == (2, 1)
    (folder / "chat_template.jinja").write_text("J")
    assert load_tokenizer(folder).chat_template == "J"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"add_bos_token": False, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    changed = load_tokenizer(folder)
    assert changed.encode("hello a", adds_special_tokens=True) == [*ids[1:], 2]
    assert not changed.adds_bos


def test_both_sources_of_one_vocabulary_agree(tmp_path):
    encoder = build_from_gguf(byte_level_metadata()).encoder
    encoder.decoder = decoders.ByteLevel()
    tokenizer = load_tokenizer(_save(tmp_path, encoder, bos_token="<s>", eos_token="<|im_end|>"))
    assert tokenizer.special_ids == BYTE_LEVEL.special_ids
    for text in ("hello world 123 é<s>", "<think>\n\n<|im_end|>", "👩‍👩‍👧"):
        ids = BYTE_LEVEL.encode(text, adds_special_tokens=True)
        assert tokenizer.encode(text, adds_special_tokens=True) == ids
        assert tokenizer.decode(ids, skips_special=False) == text
        assert encoder.decode(ids, skip_special_tokens=False) == text


def test_an_ending_that_is_not_marked_special_is_one_all_the_same(tmp_path):
    encoder = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "<": 1, "e": 2, ">": 3}, merges=[]))
    encoder.add_tokens([tokenizers.AddedToken("<e>", special=False, normalized=False)])
    encoder.decoder = decoders.ByteLevel()
    tokenizer = load_tokenizer(_save(tmp_path, encoder, eos_token="<e>"))
    assert tokenizer.special_ids == {4}
    assert tokenizer.encode("a<e>", adds_special_tokens=False) == [0, 1, 2, 3]
    assert tokenizer.encode_pieces(tokenizer.split_special("a<e>")) == [0, 4]


def test_a_vocabulary_that_holds_a_special_string_as_a_whole_word_cannot_forge_it(tmp_path):
    vocab = {"<s>": 0, "<": 1, "s": 2, ">": 3, "a": 4}
    encoder = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    encoder.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens([tokenizers.AddedToken("<s>", special=True, normalized=False)])
    encoder.encode_special_tokens = True
    assert encoder.encode("<s>").ids == [0]
    tokenizer = load_tokenizer(_save(tmp_path, encoder))
    assert tokenizer.encode("<s>", adds_special_tokens=False) == [1, 2, 3]
    assert tokenizer.encode_pieces([0, "<s>"]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "a folder without tokenizer.json"),
        ({"tokenizer.json": "{"}, "a tokenizer.json that cannot be read"),
        ({"tokenizer_config.json": "["}, "a damaged tokenizer_config.json"),
        ({"tokenizer_config.json": "[]"}, r"a damaged tokenizer_config.json \(a list\)"),
        ({"tokenizer_config.json": '{"bos_token": "<x>"}'}, "got bos_token='<x>'"),
        ({"generation_config.json": '{"eos_token_id": [7]}'}, "got eos_token_id=7"),
        ({"generation_config.json": '{"eos_token_id": "a"}'}, "got eos_token_id='a'"),
    ],
)
def test_a_damaged_folder_names_the_file(tmp_path, files, message):
    if files and "tokenizer.json" not in files:
        encoder = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        encoder.decoder = decoders.ByteLevel()
        encoder.save(str(tmp_path / "tokenizer.json"))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_a_decoder_of_another_kind_is_refused(tmp_path):
    encoder = tokenizers.Tokenizer(models.WordPiece(vocab={"a": 0, "[UNK]": 1}))
    encoder.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match=r"a decoder of \['WordPiece'\]"):
        load_tokenizer(_save(tmp_path, encoder))


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
    assert (smollm2.bos_token_id, smollm2.eos_token_ids, smollm2.adds_bos) == (1, (2,), False)
    assert smollm2.special_ids == set(range(17))


def test_smollm2_loads_in_half_a_second_of_cpu_imports_included(real_model_path):
    code = (
        "import time, sys; from pathlib import Path\n"
        "from pallasite.server.tokenizer import load_tokenizer\n"
        "load_tokenizer(Path(sys.argv[1]))\n"
        "assert 'jax' not in sys.modules\n"
        "print(time.process_time())"
    )
    command = [sys.executable, "-c", code, str(real_model_path)]
    seconds = min(
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    )
    assert seconds < 0.5
