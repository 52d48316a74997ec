"""Tokenizers of Hugging Face folders, against the library that wrote them."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from pallasite.engine.errors import ConfigError
from pallasite.server.tokenizer import load_tokenizer
from pallasite.server.tokenizer_gguf import build_from_gguf
from tests.server.tiny_tokenizers import byte_level, byte_level_metadata

BYTE_LEVEL = byte_level()


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
    assert load_tokenizer(folder).eos_token_id == 2
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    assert load_tokenizer(folder).eos_token_ids == (2, 1)
    assert load_tokenizer(folder).eos_token_id == 2
    (folder / "chat_template.json").write_text('{"chat_template": "P"}')
    assert load_tokenizer(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert load_tokenizer(folder).chat_template == "J"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"add_bos_token": False, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    del settings["chat_template"]
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    changed = load_tokenizer(folder)
    assert changed.chat_template == "P"
    assert changed.encode("hello a", adds_special_tokens=True) == [*ids[1:], 2]
    assert not changed.adds_bos


def test_tokens_that_the_settings_leave_out_are_those_of_the_special_tokens_map(tmp_path):
    folder = _save(tmp_path, _llama_encoder("legacy"), eos_token="<mask>", pad_token=None)
    named = {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**named, "add_eos_token": True}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 272)
    assert tokenizer.encode("a", adds_special_tokens=True)[-1] != 272
    (folder / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert load_tokenizer(folder).eos_token_ids == ()
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).eos_token_ids == (2,)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<x>"}')
    with pytest.raises(ConfigError, match=r"got eos_token='<x>' in .*special_tokens_map.json"):
        load_tokenizer(folder)
    (folder / "special_tokens_map.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"a damaged special_tokens_map.json"):
        load_tokenizer(folder)


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


def test_the_ends_of_the_generation_settings_cannot_be_forged_either(tmp_path):
    encoder = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "<": 1, "e": 2, ">": 3}, merges=[]))
    encoder.add_tokens([tokenizers.AddedToken("<e>", special=False, rstrip=True)])
    encoder.decoder = decoders.ByteLevel()
    folder = _save(tmp_path, encoder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 4]}')
    tokenizer = load_tokenizer(folder)
    # An ordinary token stays one.
    assert (tokenizer.eos_token_ids, tokenizer.special_ids) == ((0, 4), {4})
    assert tokenizer.encode("a<e>", adds_special_tokens=False) == [0, 1, 2, 3]
    assert tokenizer.split_special("<e>  a") == [4, "a"]


@pytest.mark.parametrize("scheme", ["first", "always", "legacy"])
def test_text_cut_inside_a_special_string_gets_no_space_that_it_does_not_have(tmp_path, scheme):
    encoder = _llama_encoder(scheme)
    state = json.loads(encoder.to_str())
    # The whole string of a special token, put together from pieces.
    state["model"]["vocab"] |= {"<": 300, "s": 301, ">": 302, "<s": 303}
    state["model"]["merges"] += [["<", "s"], ["<s", ">"]]
    encoder = tokenizers.Tokenizer.from_str(json.dumps(state))
    encoder.encode_special_tokens = True
    assert 1 in encoder.encode("a<s>", add_special_tokens=False).ids
    tokenizer = load_tokenizer(_save(tmp_path, encoder, bos_token="<s>"))
    ids = tokenizer.encode("a<s>", adds_special_tokens=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids, skips_special=True) == "a<s>"


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
        ({}, "a folder without tokenizer.json and without tokenizer.model"),
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
