"""Token ids of tiny vocabularies with every trap in them, against goldens by code that is not ours.

make_text_goldens.py made them: sentencepiece's, tiktoken's and transformers' slow tokenizers' ids.
"""

import base64
import json
import unicodedata
from pathlib import Path

import pytest

from pallasite.server.chat_template import ChatTemplate
from pallasite.server.detokenizer import Detokenizer
from pallasite.server.sentencepiece_file import read_model
from pallasite.server.tokenizer import Tokenizer, load_tokenizer
from pallasite.server.tokenizer_gguf import build_from_gguf
from tests.server.family_templates import FAMILIES
from tests.server.tiny_tokenizers import CONTROL, NORMAL, USER_DEFINED

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "text.json").read_text())
TEXTS = GOLDENS["texts"]
MODELS = GOLDENS["sentencepiece"]
CHATS = {chat["name"]: chat for chat in GOLDENS["chats"]}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes a folder with a golden's tokenizer.model and the settings given."""

    def make(model: str, settings: dict | None = None) -> Path:
        folder = tmp_path_factory.mktemp(model)
        (folder / "tokenizer.model").write_bytes(base64.b64decode(MODELS[model]["proto"]))
        if settings is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


def gguf_metadata(folder: Path, **changes) -> dict[str, object]:
    """What llama.cpp's converter makes of a folder."""
    model = read_model(folder / "tokenizer.model")
    pieces = model.pieces
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            text.replace("\u2581", " ") if kind == USER_DEFINED else text
            for text, kind in zip(pieces.texts, pieces.types, strict=True)
        ],
        "tokenizer.ggml.token_type": [*pieces.types],
        "tokenizer.ggml.scores": [*pieces.scores],
        "tokenizer.ggml.unknown_token_id": pieces.unknown_id,
        "tokenizer.ggml.bos_token_id": model.bos_id,
        "tokenizer.ggml.eos_token_id": model.eos_id,
    }
    if not model.adds_space:
        metadata["tokenizer.ggml.add_space_prefix"] = False
    return metadata | changes


def check_texts(tokenizer: Tokenizer, expected: list[list[int]]) -> None:
    got = [tokenizer.encode(text, adds_special_tokens=False) for text in TEXTS]
    assert [
        (text, ours, theirs)
        for text, ours, theirs in zip(TEXTS, got, expected, strict=True)
        if ours != theirs
    ] == []


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_tokenizer_model_encodes_as_sentencepiece_does(folder_of, name, legacy):
    tokenizer = load_tokenizer(folder_of(name, {"legacy": legacy}))
    check_texts(tokenizer, MODELS[name]["ids"])


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_of_sentencepiece_encodes_as_sentencepiece_does(folder_of, name):
    check_texts(Tokenizer(build_from_gguf(gguf_metadata(folder_of(name)))), MODELS[name]["ids"])


def encode_trusted(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes text that a template wrote, with what the checkpoint puts in front."""
    prefix = tokenizer.encode("", adds_special_tokens=True)
    return prefix + tokenizer.encode_pieces(tokenizer.split_special(text))


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_from_a_tokenizer_model_is_split_as_the_slow_tokenizer_splits(folder_of, name):
    chat = CHATS[name]
    tokenizer = load_tokenizer(folder_of(chat["model"], chat["settings"]))
    assert [encode_trusted(tokenizer, text) for text in chat["texts"]] == chat["ids"]


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_from_a_gguf_is_split_as_the_slow_tokenizer_splits(folder_of, name):
    chat = CHATS[name]
    metadata = gguf_metadata(folder_of(chat["model"]))
    metadata["general.architecture"] = {"phi3": "phi3", "gemma": "gemma3"}.get(name, "llama")
    for token_id, token in chat["settings"].get("added_tokens_decoder", {}).items():
        if int(token_id) == len(metadata["tokenizer.ggml.tokens"]):
            metadata["tokenizer.ggml.tokens"].append(token["content"])
            metadata["tokenizer.ggml.token_type"].append(CONTROL)
            metadata["tokenizer.ggml.scores"].append(-1000.0)
    tokenizer = Tokenizer(build_from_gguf(metadata))
    assert [encode_trusted(tokenizer, text) for text in chat["texts"]] == chat["ids"]


def byte_level(pre: str) -> Tokenizer:
    golden = GOLDENS["byte_level"]
    return Tokenizer(
        build_from_gguf(
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": pre,
                "tokenizer.ggml.tokens": golden["vocab"],
                "tokenizer.ggml.token_type": [NORMAL] * len(golden["vocab"]),
                "tokenizer.ggml.merges": golden["merges"],
            }
        )
    )


@pytest.mark.parametrize(
    ("pre", "published"),
    [
        ("gpt-2", "gpt2"),
        ("olmo", "gpt2"),
        ("llama-bpe", "cl100k"),
        ("dbrx", "cl100k"),
        ("qwen2", "qwen2"),
        ("tekken", "tekken"),
        ("gpt-4o", "o200k"),
    ],
)
def test_words_are_cut_where_the_published_expressions_cut(pre, published):
    tokenizer = byte_level(pre)
    composes = pre in ("olmo", "qwen2")
    expected = GOLDENS["byte_level"]["ids"][published]
    for text, ids in zip(TEXTS, expected, strict=True):
        if composes and unicodedata.normalize("NFC", text) != text:
            composed = unicodedata.normalize("NFC", text)
            assert tokenizer.encode(text, adds_special_tokens=False) == tokenizer.encode(
                composed, adds_special_tokens=False
            )
        else:
            assert tokenizer.encode(text, adds_special_tokens=False) == ids, text


def test_the_families_cut_differently():
    ids = GOLDENS["byte_level"]["ids"]
    assert len({json.dumps(of_family) for of_family in ids.values()}) == len(ids)


@pytest.mark.parametrize(("model", "family"), [("llama", "mistral-v1"), ("mistral", "mistral-v3")])
def test_a_conversation_becomes_the_ids_that_mistrals_own_library_makes(folder_of, model, family):
    metadata = gguf_metadata(folder_of(model))
    tokenizer = Tokenizer(build_from_gguf(metadata))
    template = ChatTemplate(FAMILIES[family].source, tokenizer)
    for messages, ids in zip(
        GOLDENS["mistral"]["messages"], GOLDENS["mistral"]["ids"][model], strict=True
    ):
        assert template.encode(messages) == ids


def test_text_behind_a_special_token_of_a_gguf_gets_one_space_in_front(folder_of):
    tokenizer = Tokenizer(build_from_gguf(gguf_metadata(folder_of("mistral"))))
    for text in ("[INST]hello", "[INST] hello", "hello[INST]hello", " hello[INST] hello"):
        ids = encode_trusted(tokenizer, text)
        assert tokenizer.token_text(ids[-1]) == "\u2581hello"
        assert tokenizer.token_text(ids[-2]) == "[INST]"
    double = encode_trusted(tokenizer, "[INST]  hello")
    assert "".join(map(tokenizer.token_text, double)).endswith("[INST]\u2581\u2581hello")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "no-bytes"])
def test_any_text_comes_back_whole_and_token_by_token(folder_of, name):
    tokenizer = load_tokenizer(folder_of(name))
    num_split = 0
    for text, ids in zip(TEXTS, MODELS[name]["ids"], strict=True):
        text = text.replace("\u2581", " ")
        assert tokenizer.decode(ids, skips_special=True) == text
        detokenizer = Detokenizer(tokenizer, (), False, True)
        deltas = [detokenizer.push([token_id]).text for token_id in ids]
        num_split += "" in deltas[1:] and "\ufffd" not in "".join(deltas)
        assert "".join(deltas) == text
        assert detokenizer.finish().text == ""
    assert num_split > 10
