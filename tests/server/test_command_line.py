"""The commands on a tiny model: what they print, and how they end, here and through a server."""

import io
import json
import math
import os
import re
import subprocess
import sys

import pytest

from tests.server.commands import pallasite, served
from tests.tiny_checkpoints import TINY, random_tensors, write_hf

IDS = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_hf(tmp_path_factory.mktemp("models") / "tiny", TINY, random_tensors(TINY)))


@pytest.fixture(scope="module")
def flags(compile_cache):
    line = "--weights f32 --max-requests 2 --max-context-len 64 --max-batch-tokens 16"
    return [*line.split(), "--compile-cache", str(compile_cache)]


@pytest.fixture
def sequences(tmp_path):
    items = [{"ids": IDS, "name": "kept"}, {"ids": IDS[:5]}, {"ids": [7]}]
    path = tmp_path / "sequences.json"
    path.write_text(json.dumps(items))
    return path


@pytest.fixture(scope="module")
def server(model, flags):
    """The address of `pallasite serve`."""
    with served(model, *flags) as address:
        yield address


def check_scores(out):
    """The answer of `score --json` to `sequences`, checked against itself; returns it."""
    rows = json.loads(out)
    assert [row["ids"] for row in rows] == [IDS, IDS[:5], [7]]
    assert rows[0]["name"] == "kept"
    for row in rows:
        ids, logprobs, top = row["ids"], row["logprobs"], row["top5"]
        assert logprobs[0] is None
        assert len(logprobs) == len(top) == len(ids)
        for place in top:
            values = [logprob for _, logprob in place]
            assert len({token_id for token_id, _ in place}) == 5
            assert values == sorted(values, reverse=True)
            # 320 tokens share the mass: the likeliest has more than its even share, not all.
            assert -math.log(TINY.vocab_size) < values[0] < -1
        for before, token_id, logprob in zip(top, ids[1:], logprobs[1:], strict=False):
            assert logprob == dict(before).get(token_id, logprob) < 0
            assert logprob <= before[0][1]
            assert token_id in dict(before) or logprob <= before[-1][1]
    return rows


def test_score_prints_the_list_with_its_log_probabilities(run, model, flags, sequences):
    result = run("score", model, "--input", sequences, "--json", *flags)
    assert result.status == 0
    long, short, _ = check_scores(result.out)
    # A prefix has the scores of the whole, however it was batched.
    assert short["logprobs"][1:] == pytest.approx(long["logprobs"][1:5], abs=1e-4)
    assert [place[0][0] for place in short["top5"]] == [place[0][0] for place in long["top5"][:5]]


def test_score_without_json_prints_a_table(run, model, flags, sequences):
    rows = json.loads(run("score", model, "--input", sequences, "--json", *flags).out)
    lines = run("score", model, "--input", sequences, *flags).out.splitlines()
    mean = sum(rows[1]["logprobs"][1:]) / 4
    assert lines[2].split() == ["1", "5", f"{mean:.4f}", f"{math.exp(-mean):.3f}"]


def test_generate_continues_with_what_score_finds_likeliest(run, model, flags, sequences):
    top = json.loads(run("score", model, "--input", sequences, "--json", *flags).out)[0]["top5"]
    prompt_ids = ",".join(map(str, IDS))
    line = ["--temperature", "0", "--max-tokens", "3", "--logprobs", "2", "--ignore-eos", "--json"]
    result = run("generate", model, "--prompt-ids", prompt_ids, *line, *flags)
    (answer,) = json.loads(result.out)["completions"]
    assert answer["token_ids"][0] == top[-1][0][0]
    assert answer["logprobs"][0]["logprob"] == pytest.approx(top[-1][0][1], abs=1e-4)
    assert len(answer["logprobs"][0]["top"]) == 2
    assert answer["finish_reason"] == "length"
    usage = {"prompt_tokens": 12, "cached_tokens": 0, "completion_tokens": 3}
    assert answer["usage"] == usage | {"draft_tokens": 0, "accepted_tokens": 0}
    assert re.search(r"12 prompt tokens, 3 completion tokens; first token after", result.err)


def test_a_text_prompt_is_that_texts_ids(run, model, flags, monkeypatch):
    line = ["--temperature", "0", "--max-tokens", "4", "--prompt-logprobs", "0", "--json", *flags]
    stdin = io.TextIOWrapper(io.BytesIO(bytes(IDS)))
    monkeypatch.setattr(sys, "stdin", stdin)
    results = [
        run("generate", model, "--prompt", "Hello, world", *line),
        run("generate", model, "--prompt", "-", *line),
        run("generate", model, "--prompt-ids", ",".join(map(str, IDS)), *line),
    ]
    answers = [json.loads(result.out)["completions"][0] for result in results]
    assert answers[0]["token_ids"] == answers[1]["token_ids"] == answers[2]["token_ids"]
    assert [place and place["token_id"] for place in answers[0]["prompt_logprobs"]] == [
        None,
        *IDS[1:],
    ]


def test_several_completions_are_printed_one_by_one(run, model, flags):
    line = ["--prompt", "Hello", "--n", "3", "--seed", "1", "--max-tokens", "2", "--ignore-eos"]
    result = run("generate", model, *line, "--allowed-token-ids", "97,98", *flags)
    rows = sorted(result.out.splitlines())
    assert [row[:4] for row in rows] == ["[0] ", "[1] ", "[2] "]
    assert all(re.fullmatch(r"[ab]{2}", row[4:]) for row in rows)


def test_a_stop_text_is_cut_off(run, model, flags):
    line = ["--prompt", "x", "--allowed-token-ids", "97", "--max-tokens", "5", *flags]
    assert run("generate", model, *line).out == "aaaaa\n"
    line += ["--stop", "aaa", "--json"]
    (answer,) = json.loads(run("generate", model, *line).out)["completions"]
    assert (answer["text"], answer["matched"], answer["finish_reason"]) == ("", "aaa", "stop")


def test_chat_answers_a_line_at_a_time_and_remembers(run, model, flags, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\ntwo\n")))
    line = ["--system", "s", "--allowed-token-ids", "97", "--max-tokens", "2", "--json"]
    result = run("chat", model, *line, *flags)
    first, second = map(json.loads, result.out.splitlines())
    assert first["text"] == second["text"] == "aa"
    turn = len(["<|im_start|>"]) + 1

    def num_tokens(role, text):
        return turn + len(f"{role}\n{text}\n")

    opening = turn - 1 + len("assistant\n")
    prompt = num_tokens("system", "s") + num_tokens("user", "one")
    assert first["usage"]["prompt_tokens"] == prompt + opening
    prompt += num_tokens("assistant", "aa") + num_tokens("user", "two")
    assert second["usage"]["prompt_tokens"] == prompt + opening


def test_generate_with_speculation_answers_as_without_and_says_what_was_drafted(run, model, flags):
    line = ["--prompt-ids", ",".join(["5", "6", "7", "8"] * 4), "--temperature", "0", "--json"]
    line += ["--max-tokens", "40", "--ignore-eos", "--allowed-token-ids", "5,6,7,8", *flags]
    plain, drafted = (
        json.loads(run("generate", model, *line, *more).out)["completions"][0]
        for more in ([], ["--speculate", "ngram", "--speculate-tokens", "3"])
    )
    assert drafted["token_ids"] == plain["token_ids"]
    assert plain["usage"]["draft_tokens"] == 0
    assert drafted["usage"]["draft_tokens"] >= drafted["usage"]["accepted_tokens"] >= 0


def test_info_counts_a_models_parameters_and_bytes(run, model, flags):
    tensors = random_tensors(TINY)
    num_parameters = sum(tensor.size for tensor in tensors.values())
    facts = json.loads(run("info", model, "--json", "--cache-tokens", "64", *flags).out)
    assert facts["model"]["num_parameters"] == num_parameters
    assert facts["model"]["num_layers"] == TINY.num_layers
    memory = facts["memory"]
    assert memory["weights_bytes"] == 4 * num_parameters
    assert memory["cached_token_bytes"] == 2 * 2 * 2 * 16 * 4  # k and v, layers, heads, width, f32
    assert (memory["num_pages"], memory["cached_tokens"]) == (4, 64)
    assert memory["cache_bytes"] == 64 * memory["cached_token_bytes"]
    assert facts["versions"]["jax"]
    assert facts["target"]["name"] == "cpu"
    bf16 = json.loads(run("info", model, "--json").out)["memory"]
    norms = sum(tensor.size for tensor in tensors.values() if tensor.ndim == 1)
    assert bf16["weights_bytes"] == 2 * num_parameters + 2 * norms
    assert "num parameters" in run("info", model).out
    result = run("info", model, "--max-context-len", TINY.context_len + 1)
    assert result.status == 2
    assert f"got max_context_len=513; this model was made for {TINY.context_len}" in result.err


def test_a_server_gives_the_same_answers(run, model, flags, server, sequences):
    scored = run("score", "--server", server, "--input", sequences, "--json")
    assert scored.status == 0
    rows = check_scores(scored.out)
    here = json.loads(run("score", model, "--input", sequences, "--json", *flags).out)
    for there_row, here_row in zip(rows, here, strict=True):
        assert there_row["logprobs"][1:] == pytest.approx(here_row["logprobs"][1:], abs=1e-4)
    line = ["--prompt", "Hello", "--temperature", "0.7", "--seed", "5", "--max-tokens", "8"]
    line += ["--json", "--top-k", "40", "--logit-bias", "97=2", "--bad-word", "z", "--n", "2"]
    line += ["--prompt-logprobs", "1", "--logprobs", "1", "--ignore-eos"]
    here = json.loads(run("generate", model, *line, *flags).out)["completions"]
    there = json.loads(run("generate", "tiny", "--server", server, *line).out)["completions"]
    for ours, theirs in zip(here, there, strict=True):
        for name in ("index", "text", "token_ids", "finish_reason", "matched", "usage"):
            assert ours[name] == theirs[name]
        assert len(theirs["prompt_logprobs"]) == len(ours["prompt_logprobs"]) == 5
        assert theirs["prompt_logprobs"][0] is None
        assert theirs["logprobs"][7]["logprob"] == pytest.approx(
            ours["logprobs"][7]["logprob"], abs=1e-4
        )
    line = ["--message", "hi", "--allowed-token-ids", "97", "--max-tokens", "3"]
    assert run("chat", "--server", server, *line).out == "aaa\n"


def test_a_servers_refusal_names_the_field(run, server):
    result = run("generate", "--server", server, "--prompt", "x", "--top-p", "2")
    assert result.status == 2
    assert result.err.startswith("pallasite: sampling.top_p: ")


def test_another_model_at_the_server_is_refused(run, server):
    result = run("generate", "gpt", "--server", server, "--prompt", "x")
    assert result.status == 2
    assert "got MODEL 'gpt'; the server serves 'tiny'; name that or leave MODEL out" in result.err


def test_without_a_server_the_status_is_1(run):
    result = run("generate", "--server", "127.0.0.1:1", "--prompt", "x")
    assert result.status == 1
    assert "got no answer from the server; one must listen there; check --server" in result.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate --prompt x", "got neither MODEL nor --server; one of them is required; name"),
        ("generate m --prompt x --server h:1 --weights f32", "got --weights with --server, whose"),
        ("generate m --prompt x --server-ca f", "got --server-ca without --server; it is for one"),
        ("generate m --prompt x --logprobs 2", "got --logprobs without --json; only JSON shows"),
        ("generate nothing.gguf --prompt x", "got 'nothing.gguf', no such file, folder or name; a"),
        ("chat m --n 2", "got --n 2 in a chat"),
        ("pull gpt", "got the name 'gpt'; allowed are smollm2-135m and hf:ORG/REPO@REVISION;"),
        ("serve m --tls-key k", "got a part of what TLS needs; --tls-certificate and --tls-key"),
        ("serve nothing --port 0", "got 'nothing', no such file, folder or name; a model is"),
        ("score m --input nothing.json", "got --input 'nothing.json', which cannot be read"),
        ("serve m --port 99999", "got 'm', no such file, folder or name"),
    ],
)
def test_a_bad_line_ends_with_status_2(run, line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*line.split())
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith(f"pallasite: {message}")
    assert len(result.err.splitlines()) == 1
    assert result.err.count(";") >= 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "which is no JSON"),
        ("{}", "JSON of another kind"),
        ('[{"ids": [1]}, {"id": [1]}]', "element 1 of 'bad.json' without token ids"),
        ('[{"ids": []}]', "element 0"),
        ('[{"ids": [true]}]', "element 0"),
        ('[{"ids": [1.5]}]', "element 0"),
        ('[{"ids": "12"}]', "element 0"),
        ("[[1, 2]]", "element 0"),
        ("[" * 100_000, "which is no JSON"),
    ],
)
def test_a_bad_input_file_is_named(run, model, tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    result = run("score", model, "--input", path)
    assert result.status == 2
    assert message in result.err
    assert str(tmp_path) not in result.err


def test_ids_outside_the_vocabulary_are_refused(run, model, flags, tmp_path):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps([{"ids": [1, TINY.vocab_size]}]))
    result = run("score", model, "--input", path, *flags)
    assert result.status == 2
    assert "prompt" in result.err
    assert str(TINY.vocab_size) in result.err


def test_a_checkpoint_without_a_tokenizer_can_be_scored(run, flags, tmp_path, sequences):
    folder = write_hf(tmp_path / "bare", TINY, random_tensors(TINY))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    assert run("score", folder, "--input", sequences, "--json", *flags).status == 0
    result = run("generate", folder, "--prompt", "x", *flags)
    assert result.status == 2
    assert "tokenizer" in result.err


def test_a_truncated_checkpoint_ends_with_status_2_and_no_traceback(model, flags, tmp_path):
    folder = write_hf(tmp_path / "cut", TINY, random_tensors(TINY))
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    result = pallasite("generate", folder, "--prompt", "x", *flags)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert re.match(r"pallasite: .*model\.", last)
    assert "Traceback" not in result.stderr
    assert str(tmp_path) not in result.stderr


def test_demo_serves_chats_and_stops(model, flags):
    result = pallasite("demo", model, *flags, "--max-context-len", "256")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("user: In one sentence: what is a meteorite?\nassistant: ")
    assert "tiny is served on 127.0.0.1:" in result.stderr
    assert re.search(
        r"completion tokens; first token after [0-9.]+ s, then [0-9.]+ tokens/s", result.stderr
    )
    assert "stopping" in result.stderr


def test_a_reader_that_leaves_is_no_traceback():
    command = [sys.executable, "-m", "pallasite.server", "serve", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_what_was_imported_is_not_looked_through_for_garbage():
    """Also after a first command, and garbage is looked for again."""
    program = (
        "import gc, sys\n"
        "from pallasite.server.__main__ import main\n"
        "assert 'jax' not in sys.modules\n"
        "assert main(['info', 'no/such.gguf']) == 2\n"
        "assert 'jax' in sys.modules\n"
        "count = gc.get_freeze_count()\n"
        "assert gc.isenabled() and count > len(gc.get_objects()), count\n"
        "main(['info', 'no/such.gguf'])\n"
        "assert gc.get_freeze_count() <= count\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
