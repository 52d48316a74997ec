"""Adapters from the command line: loaded here or by a server, named in a request, refused."""

import json

import pytest

from tests.engine.harness import lively_tensors
from tests.peft_adapters import Peft
from tests.server.commands import served
from tests.tiny_checkpoints import TINY, write_hf

PEFTS = {name: Peft(tensors=lively_tensors(), seed=i) for i, name in enumerate(("one", "two"))}
GREEDY = ("--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--json")
ASK = ("--prompt", "Hello", *GREEDY)
SAY = ("--message", "hi", *GREEDY)
ROOM = ("--max-adapters", "2", "--max-adapter-rank", "4")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The model, and the same with an adapter merged into it, by the adapter's name."""
    folder = tmp_path_factory.mktemp("models")
    tensors = {"": lively_tensors(), **{name: peft.merged() for name, peft in PEFTS.items()}}
    return {name: write_hf(folder / f"tiny{name}", TINY, each) for name, each in tensors.items()}


@pytest.fixture(scope="module")
def flags(compile_cache):
    line = "--weights f32 --max-requests 2 --max-context-len 64 --max-batch-tokens 16"
    return [*line.split(), "--compile-cache", str(compile_cache)]


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """The flags that load each adapter, by its name."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: ["--load-adapter", f"{name}={peft.write(folder / name)}"]
        for name, peft in PEFTS.items()
    }


@pytest.fixture(scope="module")
def server(models, flags, loads):
    both = [argument for line in loads.values() for argument in line]
    with served(models[""], *flags, *ROOM, *both) as address:
        yield address


@pytest.fixture
def sequences(tmp_path):
    path = tmp_path / "sequences.json"
    path.write_text(json.dumps([{"ids": list(b"over the lazy dog")}]))
    return path


def tokens(result):
    assert result.status == 0, result.err
    (answer,) = json.loads(result.out)["completions"]
    return answer["token_ids"]


def chat_tokens(result):
    assert result.status == 0, result.err
    return json.loads(result.out)["token_ids"]


def logprobs(result):
    assert result.status == 0, result.err
    (row,) = json.loads(result.out)
    return row["logprobs"][1:]


def test_an_adapter_answers_as_the_model_that_it_is_merged_into(
    run, models, flags, loads, server, sequences
):
    """Here and through a server, whose loaded adapters change nothing unless they are named."""
    answers, chats, scores = [], [], []
    for name, merged in models.items():
        named = ["--adapter", name] if name else []
        here = [models[""], *flags, *ROOM, *loads.get(name, []), *named]
        there = ["--server", server, *named]
        expected = tokens(run("generate", merged, *ASK, *flags))
        assert tokens(run("generate", *here, *ASK)) == expected
        assert tokens(run("generate", *there, *ASK)) == expected
        chat = chat_tokens(run("chat", merged, *SAY, *flags))
        assert chat_tokens(run("chat", *here, *SAY)) == chat
        assert chat_tokens(run("chat", *there, *SAY)) == chat
        rows = ["--input", sequences, "--json"]
        score = logprobs(run("score", merged, *rows, *flags))
        assert logprobs(run("score", *here, *rows)) == pytest.approx(score, abs=1e-3)
        assert logprobs(run("score", *there, *rows)) == pytest.approx(score, abs=1e-3)
        answers.append(expected)
        chats.append(chat)
        scores.append(score)
    for different in (answers, chats, scores):
        assert len(set(map(tuple, different))) == len(models)
    gaps = [abs(a - b) for a, b in zip(scores[0], scores[1], strict=True)]
    assert max(gaps) > 0.1, "far beyond the tolerance above"


def test_an_adapter_that_is_not_loaded_is_named(run, server):
    for command, *line in (["generate", *ASK], ["chat", *SAY]):
        result = run(command, "--server", server, *line, "--adapter", "three")
        assert result.status == 2
        expected = "adapter: got 'three', which is not loaded; loaded are: one, two; choose"
        assert result.err.splitlines()[-1].startswith(f"pallasite: {expected}")
        assert result.out == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            ["--adapter", "two"],
            "got --adapter 'two', which is not loaded; loaded are: one; load it",
        ),
        ([], "got --load-adapter of 'one', which nothing would use; allowed is the one that"),
    ],
)
def test_what_is_loaded_here_must_be_what_answers_before_the_model_is(
    run, models, flags, loads, sequences, line, message
):
    """Nobody takes the base's answers for an adapter's."""
    for command, *rest in (
        ["generate", *ASK],
        ["chat", *SAY],
        ["score", "--input", sequences],
        ["evaluate", "--text", sequences],
    ):
        result = run(command, models[""], *flags, *ROOM, *loads["one"], *rest, *line)
        assert result.status == 2
        assert result.err.startswith(f"pallasite: {message}")
        # One line: no progress stands before it.
        assert len(result.err.splitlines()) == 1
        assert result.out == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--load-adapter one", "got --load-adapter 'one'; allowed is a name, = and a folder; see"),
        ("--load-adapter =f", "got --load-adapter '=f'; allowed is a name, = and a folder; see"),
        ("--load-adapter a=", "got --load-adapter 'a='; allowed is a name, = and a folder; see"),
        ("--load-adapter a=f", "got 1 --load-adapter and --max-adapters 0; there must be room for"),
        (
            "--load-adapter a=f --load-adapter a=g --max-adapters 2",
            "got two --load-adapter of one name; each has its own; rename one",
        ),
        ("--max-adapters -1", "got max_adapters=-1; it must be at least 0; raise it"),
        ("--max-adapters x", "got --max-adapters 'x'; allowed is a whole number; see"),
        ("--max-adapter-rank 0", "got max_adapter_rank=0; it must be at least 1; raise it"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_bad_flags_end_with_status_2(run, models, command, line, message):
    prompt = ["--prompt", "x"] if command == "generate" else []
    result = run(command, models[""], *prompt, *line.split())
    assert result.status == 2
    assert result.err.startswith(f"pallasite: {message}")
    assert result.err.count("; ") >= 2
    assert result.out == ""


def test_a_folder_without_an_adapter_ends_with_status_2(run, models, flags, tmp_path):
    line = [models[""], *flags, "--max-adapters", "1", "--max-adapter-rank", "4"]
    odd = Peft(tensors=lively_tensors(), rank=5).write(tmp_path / "odd")
    for folder, message in (
        (tmp_path / "none", "got 'adapter_config.json', which cannot be read"),
        (odd, "got an adapter of rank 5; at most 4 is allowed; start the server with a higher"),
    ):
        for command in (["generate", *ASK], ["serve", "--port", "0"]):
            load = ["--load-adapter", f"a={folder}"]
            load += ["--adapter", "a"] if command[0] == "generate" else []
            result = run(command[0], *line, *load, *command[1:])
            assert result.status == 2
            assert result.err.splitlines()[-1].startswith(f"pallasite: {message}")
            assert str(tmp_path) not in result.err
            assert result.out == ""


def test_a_servers_adapters_are_its_own(run, server):
    line = ["--prompt", "x", "--load-adapter", "a=f", "--max-adapters", "1"]
    result = run("generate", "--server", server, *line)
    assert result.status == 2
    assert "got --max-adapters with --server, whose engine is set up already" in result.err
    result = run("generate", "--server", server, "--prompt", "x", "--load-adapter", "a=f")
    assert result.status == 2


def test_what_cannot_use_an_adapter_takes_none(run, models):
    result = run("info", models[""], "--load-adapter", "a=f")
    assert result.status == 2
    assert "got '--load-adapter a=f'; no such argument is known" in result.err


def test_room_for_adapters_is_counted(run, models):
    """Two slots of rank 4 for the seven matrices of two layers: A and B of each, in f32."""
    width, ffn, keys = TINY.model_width, TINY.ffn_width, TINY.num_kv_heads * TINY.head_width
    inputs = 3 * width + width + 2 * width + ffn
    outputs = width + 2 * keys + width + 2 * ffn + width
    line = ["--weights", "f32", *ROOM, "--json"]
    memory = json.loads(run("info", models[""], *line).out)["memory"]
    num_flags = 7 * 2  # whether each slot changes each matrix
    expected = 4 * 2 * 4 * TINY.num_layers * (inputs + outputs) + num_flags
    assert memory["device_adapters_bytes"] == expected
    none = json.loads(run("info", models[""], "--json").out)["memory"]
    assert none["device_adapters_bytes"] == 0
