"""`pallasite quantize`: what it writes beside the weights, and what it refuses before it begins."""

import json
from dataclasses import replace

import pytest

from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.checkpoint_write import TOKENIZER_GGUF
from pallasite.server import command_quantize
from pallasite.server.tokenizer import load_tokenizer
from tests.engine.harness import lively_tensors
from tests.families import FAMILY_MODELS
from tests.family_files import ARCHITECTURES, write_family_gguf
from tests.server.tiny_tokenizers import byte_level_metadata, sentencepiece_metadata
from tests.tiny_checkpoints import TINY, gguf_tokenizer, random_tensors, write_gguf, write_hf

CHAT = "<|im_start|> hello\n\n<|im_end|>\n  <s> abc <|endoftext|> he</s><|eot_id|> \tst 1234é"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("models") / "tiny", TINY, lively_tensors())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("crystals of olivine " * 60)
    return path


def quantized(run, source, out, *flags):
    result = run("quantize", source, out, "--rules", "int8", *flags)
    assert result.status == 0, result.err
    return out


def family_gguf(path, kind, metadata):
    """A tiny model of an architecture, with a vocabulary."""
    found = next(m for m in FAMILY_MODELS.values() if m.has_gguf and m.text["model_type"] == kind)
    ends = {
        f"{name}_token_id": metadata.pop(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos")
    }
    sizes = {"vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    inner = found.text | sizes | ends
    hf = found.hf | {"text_config": inner} if "text_config" in found.hf else inner
    return write_family_gguf(path, replace(found, hf=hf), "F32", metadata)


@pytest.mark.parametrize("vocabulary", [sentencepiece_metadata, byte_level_metadata])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_chat_has_the_same_tokens_after_a_gguf_is_quantized(run, tmp_path, kind, vocabulary):
    source = family_gguf(tmp_path / "model.gguf", kind, vocabulary())
    before = load_tokenizer(source)
    once = quantized(run, source, tmp_path / "once")
    twice = quantized(run, once, tmp_path / "twice")
    pieces = before.split_special(CHAT)
    assert any(isinstance(piece, int) for piece in pieces)
    for folder in (once, twice):
        after = load_tokenizer(folder)
        assert after.split_special(CHAT) == pieces
        assert after.encode_pieces(pieces) == before.encode_pieces(pieces)
        assert after.eos_token_ids == before.eos_token_ids
        for adds in (True, False):
            ids = before.encode(CHAT, adds_special_tokens=adds)
            assert after.encode(CHAT, adds_special_tokens=adds) == ids
    assert sorted(path.name for path in twice.iterdir()) == sorted(
        ["config.json", "model.safetensors", TOKENIZER_GGUF]
    )


def test_a_phi3s_space_behind_a_token_is_taken_after_quantize_as_before(run, tmp_path):
    source = family_gguf(tmp_path / "model.gguf", "phi3", sentencepiece_metadata())
    after = load_tokenizer(quantized(run, source, tmp_path / "new"))
    assert after.split_special("<|im_start|>  he")[1:] == ["he"]
    assert after.split_special("<s>  he")[1:] == ["  he"]


def test_config_json_comes_last_where_the_source_is_a_gguf(run, tmp_path):
    """A folder without its tokenizer would be taken for a whole one."""
    tensors = random_tensors(TINY)
    source = write_gguf(tmp_path / "tiny.gguf", TINY, tensors, tokenizer=gguf_tokenizer(TINY))
    folder = quantized(run, source, tmp_path / "new")
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert max(times, key=times.get) == "config.json"


@pytest.mark.parametrize(
    ("rules", "is_full", "message"),
    [
        ("int8", True, "got the folder 'out', which is not empty; a checkpoint needs a new one;"),
        ("mpl=int8", False, "got the weight pattern 'mpl', which matches none of this model's"),
        (
            "int5",
            False,
            "got the weight form 'int5'; allowed are f32, bf16, fp8, q4_1, q8_0, int8,",
        ),
        ("(=int8", False, "got the weight pattern '(', which is no regular expression"),
        ("int4:48", False, "got the form int4:48 for a weight with rows of 128; a group must"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_text_is_run(
    run, model, text, tmp_path, monkeypatch, rules, is_full, message
):
    def run_none(*args):
        pytest.fail("the model was loaded and the text run")

    monkeypatch.setattr(command_quantize, "_smoothed", run_none)
    out = tmp_path / "out"
    if is_full:
        out.mkdir()
        (out / "mine").write_text("")
    result = run("quantize", model, out, "--rules", rules, "--smooth", text)
    assert result.status == 2
    assert result.err.startswith(f"pallasite: {message}")
    assert result.err.count("; ") >= 2
    assert len(result.err.splitlines()) == 1
    assert [path.name for path in out.glob("*")] == (["mine"] if is_full else [])


def test_smoothings_windows_fit_a_short_context(run, text, tmp_path, monkeypatch):
    """A model knows no positions beyond its context: what it does there says nothing."""
    short = replace(TINY, context_len=48)
    source = write_hf(tmp_path / "short", short, lively_tensors())
    measure, seen = command_quantize.measure_inputs, []

    def measured(model, mesh, target, windows):
        seen.extend(map(len, windows))
        return measure(model, mesh, target, windows)

    monkeypatch.setattr(command_quantize, "measure_inputs", measured)
    folder = quantized(run, source, tmp_path / "new", "--smooth", text)
    assert sum(seen) == 1200
    assert max(seen) == 48
    assert json.loads((folder / "config.json").read_text())["quantization_config"]
    assert open_checkpoint(folder).config.context_len == 48


def test_smoothing_is_refused_where_the_model_has_no_room_in_f32(
    run, model, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(command_quantize, "memory_limit", lambda device: 1000)
    result = run("quantize", model, tmp_path / "out", "--rules", "w8a8", "--smooth", text)
    assert result.status == 2
    assert result.err.splitlines()[-1].startswith("pallasite: got --smooth for a model of 0.0 GB")
    assert "leave --smooth out" in result.err
    assert not (tmp_path / "out").exists()
