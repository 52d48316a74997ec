"""`pallasite evaluate` on a tiny model: its figures against those of an oracle in numpy."""

import io
import json
import re
import sys

import numpy as np
import pytest

from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.errors import ConfigError
from pallasite.models.quantize import QuantizedTensor
from pallasite.server.command_evaluate import cut
from pallasite.server.tokenizer import load_tokenizer
from tests.engine.harness import ORACLE, lively_tensors
from tests.engine.llama_oracle import LlamaOracle
from tests.peft_adapters import Peft
from tests.tiny_checkpoints import TINY, write_hf

WINDOW = 32
TEXT = (
    "A pallasite is a stony-iron meteorite: é, ü and\r\ncrystals of olivine in a metal matrix. " * 2
)
PEFT = Peft(tensors=lively_tensors(), seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("models") / "tiny", TINY, lively_tensors())


@pytest.fixture(scope="module")
def flags(compile_cache):
    line = "--weights f32 --max-requests 2 --max-context-len 64 --max-batch-tokens 16"
    return [*line.split(), "--compile-cache", str(compile_cache), "--window", str(WINDOW)]


@pytest.fixture
def evaluate(run, model, flags, tmp_path):
    """Evaluates a text, given as its bytes; returns what --json says."""

    def evaluate(content, *argv, of=model):
        path = tmp_path / "text"
        path.write_bytes(content)
        result = run("evaluate", of, "--text", path, *flags, "--json", *argv)
        assert result.status == 0, result.err
        return json.loads(result.out)

    return evaluate


def oracle_logprobs(windows, oracle=ORACLE):
    """Each token's log-probability but the first's of each window, in f64."""
    found = []
    for window in windows:
        logits = oracle.logits(window)[:-1]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        found += logprobs[np.arange(len(window) - 1), window[1:]].tolist()
    return np.array(found)


def bytes_windows(content, window=WINDOW, begin=()):
    """Windows of a text whose tokens are its bytes."""
    step = window - len(begin)
    windows = [[*begin, *content[i : i + step]] for i in range(0, len(content), step)]
    return [window for window in windows if len(window) > 1]


def perplexity(windows, oracle=ORACLE):
    return np.exp(-oracle_logprobs(windows, oracle).mean())


def test_perplexity_is_the_oracles(evaluate):
    content = TEXT.encode()
    windows = bytes_windows(content)
    result = evaluate(content)
    assert set(result) == {"num_windows", "num_tokens", "perplexity"}
    assert result["num_windows"] == len(windows) == 6
    assert result["num_tokens"] == sum(len(window) - 1 for window in windows)
    assert result["perplexity"] == pytest.approx(perplexity(windows), rel=1e-4)
    # The tolerance tells this text from one whose lines end otherwise.
    other = perplexity(bytes_windows(content.replace(b"\r\n", b"\n")))
    assert other != pytest.approx(result["perplexity"], rel=1e-3)


@pytest.mark.parametrize(
    ("num_bytes", "window", "num_windows", "num_tokens"),
    [
        (32, 32, 1, 31),
        (33, 32, 1, 31),
        (34, 32, 2, 32),
        (31, 32, 1, 30),
        (2, 32, 1, 1),
        (8, 2, 4, 4),
        (9, 2, 4, 4),
    ],
)
def test_the_edges_of_windows(evaluate, num_bytes, window, num_windows, num_tokens):
    """A last window of one token predicts nothing, and is left out."""
    content = TEXT.encode()[:num_bytes]
    result = evaluate(content, "--window", window)
    assert (result["num_windows"], result["num_tokens"]) == (num_windows, num_tokens)
    expected = perplexity(bytes_windows(content, window))
    assert result["perplexity"] == pytest.approx(expected, rel=1e-4)


def with_bos(folder):
    """The model, with a tokenizer that begins each text with BOS."""
    write_hf(folder, TINY, lively_tensors())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": True}))
    return folder


@pytest.mark.parametrize(("num_bytes", "num_windows"), [(1, 1), (31, 1), (32, 2), (62, 2)])
def test_each_window_begins_as_a_text_does(evaluate, tmp_path, num_bytes, num_windows):
    content = TEXT.encode()[:num_bytes]
    result = evaluate(content, of=with_bos(tmp_path / "bos"))
    windows = bytes_windows(content, begin=(257,))
    assert (result["num_windows"], result["num_tokens"]) == (num_windows, num_bytes)
    assert result["perplexity"] == pytest.approx(perplexity(windows), rel=1e-4)


def test_what_ends_a_text_is_in_no_window(tmp_path):
    """A tokenizer that puts something behind a prompt, too, puts it nowhere within a text."""
    folder = with_bos(tmp_path / "ends")
    path = folder / "tokenizer.json"
    special = {
        name: {"id": name, "ids": [token_id], "tokens": [name]}
        for name, token_id in (("<|im_start|>", 257), ("<|im_end|>", 258))
    }
    template = [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
    ]
    processor = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": template,
        "special_tokens": special,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": processor}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("ab", adds_special_tokens=True) == [257, 97, 98, 258]
    assert cut("abc", tokenizer, 3) == [[257, 97, 98], [257, 99]]


def test_a_model_agrees_with_itself(evaluate, model, tmp_path):
    """In f32 also with itself in another folder, whose vocabulary is padded otherwise."""
    padded = write_hf(tmp_path / "padded", TINY, lively_tensors())
    path = padded / "tokenizer.json"
    settings = json.loads(path.read_text())
    last = TINY.vocab_size - 1
    settings["added_tokens"].append({**settings["added_tokens"][0], "id": last, "content": "<pad>"})
    path.write_text(json.dumps(settings))
    assert load_tokenizer(padded).vocab_size != load_tokenizer(model).vocab_size
    for other in (model, padded):
        result = evaluate(TEXT.encode(), "--against", other)
        against = result["against"]
        assert set(against) == {
            "perplexity",
            "perplexity_ratio",
            "logprob_difference",
            "top_agreement",
        }
        assert against["perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)
        assert against["perplexity_ratio"] == pytest.approx(1.0, abs=1e-5)
        assert against["logprob_difference"] < 1e-4
        assert against["top_agreement"] == 1.0


def test_a_comparison_is_with_the_model_in_f32(evaluate, model):
    """A quantized form differs, and the reference does not follow it."""
    content = TEXT.encode()
    windows = bytes_windows(content)
    quantized = evaluate(content, "--quantize", "int4:16", "--against", model)
    against = quantized["against"]
    assert against["perplexity"] == pytest.approx(perplexity(windows), rel=1e-4)
    ratio = quantized["perplexity"] / against["perplexity"]
    assert against["perplexity_ratio"] == pytest.approx(ratio)
    assert abs(ratio - 1) > 1e-3
    assert against["logprob_difference"] > 1e-2
    assert 0 < against["top_agreement"] < 1


def test_a_reference_is_f32_whatever_its_checkpoint_holds_it_in(run, evaluate, model, tmp_path):
    """Stored as w8a8, its values are what they are, but inputs are not rounded to int8."""
    folder = tmp_path / "w8a8"
    assert run("quantize", model, folder, "--rules", "w8a8;lm_head=w8a8").status == 0
    checkpoint = open_checkpoint(folder)
    tensors = {name: checkpoint.read(name) for name in checkpoint.shapes}
    is_stored = {name for name, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)}
    assert "lm_head.weight" in is_stored
    floats = {
        name: tensor.dequantize() if name in is_stored else tensor.astype(np.float32)
        for name, tensor in tensors.items()
    }
    content = TEXT.encode()
    expected = perplexity(bytes_windows(content), LlamaOracle(TINY, floats))
    result = evaluate(content, "--against", folder, of=folder)
    assert result["against"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert result["perplexity"] != pytest.approx(expected, rel=2e-4)
    assert result["against"]["logprob_difference"] > 1e-3


def test_an_adapter_is_evaluated_beside_its_base(evaluate, model, tmp_path):
    content = TEXT.encode()
    windows = bytes_windows(content)
    adapted = LlamaOracle(TINY, PEFT.merged())
    line = ["--max-adapters", "1", "--max-adapter-rank", "4"]
    line += ["--load-adapter", f"a={PEFT.write(tmp_path / 'a')}", "--adapter", "a"]
    result = evaluate(content, *line, "--against", model)
    assert result["perplexity"] == pytest.approx(perplexity(windows, adapted), rel=1e-4)
    assert result["against"]["perplexity"] == pytest.approx(perplexity(windows), rel=1e-4)
    difference = np.abs(oracle_logprobs(windows, adapted) - oracle_logprobs(windows)).mean()
    assert result["against"]["logprob_difference"] == pytest.approx(difference, rel=1e-3)
    base, other = (np.concatenate([o.logits(w)[:-1] for w in windows]) for o in (ORACLE, adapted))
    agreement = (base.argmax(-1) == other.argmax(-1)).mean()
    assert result["against"]["top_agreement"] == pytest.approx(agreement, abs=1e-9)
    assert 0 <= agreement < 1


def test_without_json_a_person_reads_it(run, evaluate, model, flags, tmp_path):
    content = TEXT.encode()
    result = evaluate(content, "--quantize", "int4:16", "--against", model)
    line = ["--text", tmp_path / "text", *flags, "--quantize", "int4:16", "--against", model]
    shown = run("evaluate", model, *line).out.splitlines()
    against = result["against"]
    number = r"([0-9.]+)"
    patterns = [
        rf"perplexity {number} over {result['num_tokens']} tokens",
        rf"against    {number} \(([+-][0-9.]+)%\)",
        rf"mean \|difference of log-probability\| {number}",
        rf"top-1 agreement {number}%",
    ]
    matches = [re.fullmatch(*pair) for pair in zip(patterns, shown, strict=True)]
    assert all(matches), shown
    values = [float(group) for match in matches for group in match.groups()]
    expected = [
        result["perplexity"],
        against["perplexity"],
        100 * (against["perplexity_ratio"] - 1),
        against["logprob_difference"],
        100 * against["top_agreement"],
    ]
    assert values == pytest.approx(expected, rel=1e-3, abs=0.006)


def test_a_text_comes_by_standard_input_too(run, evaluate, model, flags, monkeypatch):
    content = TEXT.encode()
    expected = evaluate(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    result = json.loads(run("evaluate", model, "--text", "-", *flags, "--json").out)
    assert result["num_tokens"] == expected["num_tokens"]
    assert result["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"caf\xe9", [], "got --text 'text', which is not UTF-8; it must be; convert it"),
        (b"", [], "got a text of 0 tokens; two at least are needed to predict one; choose a"),
        (b"a", [], "got a text of 1 tokens; two at least are needed to predict one; choose a"),
        (None, [], "got --text 'text', which cannot be read (No such file or directory); allowed"),
        (b"a" * 64, ["--window", 64], "got windows of 64 tokens in a context of 64; they must be"),
        (b"ab", ["--window", 1], "got --window '1'; allowed is a whole number from 2 on; see"),
        (b"ab", ["--window", "x"], "got --window 'x'; allowed is a whole number from 2 on; see"),
        (b"ab", ["--against", "none"], "got 'none', no such file, folder or name; a model is"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_anything_is_loaded(
    run, model, flags, tmp_path, content, line, message
):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    result = run("evaluate", model, "--text", path, *flags, *line)
    assert result.status == 2
    # One line: no progress stands before it.
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith(f"pallasite: {message}")
    assert result.err.count("; ") >= 2
    assert str(tmp_path) not in result.err
    assert result.out == ""


def test_a_long_window_is_no_fault_where_the_text_is_short(evaluate):
    assert evaluate(b"a" * 40, "--window", 512)["num_tokens"] == 39


def test_a_window_must_hold_more_than_a_texts_beginning(tmp_path):
    tokenizer = load_tokenizer(with_bos(tmp_path / "bos"))
    assert cut("ab", tokenizer, 2) == [[257, 97], [257, 98]]
    tokenizer.prefix_ids = (257, 257)
    with pytest.raises(ConfigError, match="got windows of 2 tokens, 2 of which begin every text"):
        cut("ab", tokenizer, 2)


def test_a_model_with_other_tokens_is_no_reference(run, model, flags, tmp_path):
    """Also where both vocabularies are of one size."""
    other = write_hf(tmp_path / "other", TINY, lively_tensors())
    path = other / "tokenizer.json"
    settings = json.loads(path.read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(settings))
    assert load_tokenizer(other).vocab_size == load_tokenizer(model).vocab_size
    text = tmp_path / "text"
    text.write_text("a banana")
    result = run("evaluate", model, "--text", text, *flags, "--against", other)
    assert result.status == 2
    assert result.err.startswith("pallasite: got --against with another vocabulary; both models")
    assert len(result.err.splitlines()) == 1
