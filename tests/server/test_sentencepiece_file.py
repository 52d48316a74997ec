"""Folders with tokenizer.model alone: what is in one that is not encoding, and what is refused."""

import base64
import json
from pathlib import Path

import pytest

from pallasite.engine.errors import ConfigError
from pallasite.server.sentencepiece_file import MAX_FILE_BYTES, read_model
from pallasite.server.tokenizer import load_tokenizer

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "text.json").read_text())
PROTOS = {
    name: base64.b64decode(golden["proto"]) for name, golden in GOLDENS["sentencepiece"].items()
}


def _folder(folder: Path, proto: bytes, **files: object) -> Path:
    (folder / "tokenizer.model").write_bytes(proto)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_folder_without_settings_has_the_models_own(tmp_path):
    tokenizer = load_tokenizer(_folder(tmp_path, PROTOS["llama"]))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.special_ids == {1, 2}
    ids = tokenizer.encode("hello 数<0x41>\n", adds_special_tokens=True)
    assert ids[0] == 1
    assert tokenizer.decode(ids, skips_special=True) == "hello 数<0x41>\n"
    assert [tokenizer.token_bytes(3 + byte) for byte in range(256)] == [
        bytes([byte]) for byte in range(256)
    ]


def test_gemmas_begins_with_bos_and_puts_no_space_in_front(tmp_path):
    tokenizer = load_tokenizer(_folder(tmp_path, PROTOS["gemma"]))
    ids = tokenizer.encode("hello", adds_special_tokens=True)
    assert (ids[0], tokenizer.token_text(ids[0])) == (2, "<bos>")
    assert tokenizer.decode(ids, skips_special=True) == "hello"
    # A tag of HTML, and the end of a text in other families.
    table = tokenizer.encode("<table></s>", adds_special_tokens=False)
    assert [tokenizer.token_text(i) for i in table] == ["<table>", "</s>"]
    assert tokenizer.decode(table, skips_special=True) == "<table></s>"


def test_added_tokens_of_old_folders_follow_the_models(tmp_path):
    size = len(read_model(_folder(tmp_path, PROTOS["llama"]) / "tokenizer.model").pieces.texts)
    folder = _folder(
        tmp_path,
        PROTOS["llama"],
        added_tokens={"<|im_end|>": size, "<|im_start|>": size + 1},
        tokenizer_config={"eos_token": "<|im_end|>", "add_bos_token": False},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_ids == (size,)
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.encode("hello", adds_special_tokens=True)[0] != 1
    pieces = tokenizer.split_special("<|im_start|>the<|im_end|>")
    assert pieces == ["<|im_start|>the", size]
    ids = tokenizer.encode_pieces(pieces)
    assert [tokenizer.token_text(i) for i in ids] == ["<|im_start|>", "\u2581the", "<|im_end|>"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<x>": 9999}}, "got added token '<x>' with id 9999"),
        ({"added_tokens": {"<x>": "1"}}, "got added token '<x>' with id '1' in added_tokens.json"),
        ({"added_tokens": {"": 560}}, "got added token '' with id 560"),
        (
            {
                "tokenizer_config": {
                    "added_tokens_decoder": {"1": {"content": "x", "special": True}}
                }
            },
            "got added token 'x' with id 1",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"a": {"content": "<x>"}}}},
            "got added token '<x>' with id 'a' in tokenizer_config.json",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "a damaged tokenizer_config.json"),
        ({"tokenizer_config": {"bos_token": "<x>"}}, "got bos_token='<x>'"),
    ],
)
def test_tokens_that_have_no_place_are_refused(tmp_path, files, message):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(_folder(tmp_path, PROTOS["llama"], **files))


# A message's fields may stand several times, and the last counts: what is appended changes it.
@pytest.mark.parametrize(
    ("appended", "message"),
    [
        (b"\x12\x02\x18\x01", "a model of type 'unigram'; it must have one of type 'bpe'"),
        (b"\x12\x02\x18\x04", "a model of type 'char'"),
        (b"\x12\x02\x18\x09", "a model of type 9"),
        (b"\x12\x03\xc0\x01\x01", "treat_whitespace_as_suffix"),
        (b"\x1a\x0b\x0a\x06nfkc\xc3\xa9\x12\x01x", "a normalizer that changes characters .'nfkcé'"),
        (b"\x2a\x03\x12\x01x", "a normalizer that changes characters"),
        (b"\x1a\x02\x20\x01", "remove_extra_whitespaces"),
        (b"\x1a\x02\x28\x00", "spaces that are not escaped"),
        (b"\x12\x04\xc0\x02\x90\x4e", "560 pieces and a piece 10000"),
        (b"\x0a\x00", "an empty piece"),
        (b"\x0a\x03\x0a\x01\xff", "bytes that are no such message"),
        (b"\x0a\x05\x0a\x03the", "1 repeated pieces"),
        (b"\x0a\x0a\x0a\x06<0x00>\x18\x06", "1 repeated pieces"),
        (b"\x0a\x0a\x0a\x06<0x0G>\x18\x06", "257 byte pieces"),
        (b"\x0a\x08\x0a\x04\xe2\x96\x81\x21\x18\x04", "pieces that begin with a space"),
        (b"\x0a\x0a", "bytes that are no such message"),
    ],
)
def test_what_a_tokenizer_model_asks_for_and_is_not_done_is_refused(tmp_path, appended, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(_folder(tmp_path, PROTOS["llama"] + appended))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (b"", "0 pieces; it must have 1 to"),
        (b"{}", "bytes that are no such message"),
        (b"\x0a\x00" * (MAX_FILE_BYTES // 2), "4194304 pieces; it must have 1 to"),
        (b"\0" * (MAX_FILE_BYTES + 1), "8388609 bytes; it must have at most 8388608"),
    ],
)
def test_a_tokenizer_model_of_any_bytes_is_bounded(tmp_path, proto, message):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(_folder(tmp_path, proto))


def test_a_tokenizer_model_cut_anywhere_is_refused_or_smaller(tmp_path):
    proto = PROTOS["no-bytes"]
    for end in range(0, len(proto), 97):
        try:
            tokenizer = load_tokenizer(_folder(tmp_path, proto[:end]))
        except ConfigError:
            continue
        assert tokenizer.vocab_size <= 320
