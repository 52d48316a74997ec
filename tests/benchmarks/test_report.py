"""Figures of hand-made records, each computed by hand beside them."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.report import (
    RequestRecord,
    check_plot,
    cumulative,
    latency_rows,
    machine,
    parse_goodput,
    serving_result,
    shown,
    spread,
    summary,
    table,
    write_json,
    write_plot,
)
from pallasite.models.errors import ConfigError

# Sent at 10 s: tokens at 10.2, 10.3 and two together at 10.5; over at 10.6.
FIRST = RequestRecord(
    start_s=10.0, end_s=10.6, num_prompt_tokens=7, events=((10.2, 1), (10.3, 1), (10.5, 2))
)
# Sent when the first ended; a single token.
SECOND = RequestRecord(start_s=10.6, end_s=11.6, num_prompt_tokens=5, events=((11.5, 1),))
FAILED = RequestRecord(
    start_s=10.0, end_s=12.0, num_prompt_tokens=100, events=((10.1, 1),), error="UNAVAILABLE"
)


def test_times_of_one_request():
    assert FIRST.num_output_tokens == 4
    assert FIRST.ttft_s == pytest.approx(0.2)
    assert FIRST.latency_s == pytest.approx(0.6)
    assert FIRST.tpot_s == pytest.approx((0.6 - 0.2) / 3)
    assert FIRST.itl_s == pytest.approx((0.1, 0.2))
    assert SECOND.tpot_s is None
    assert SECOND.itl_s == ()


def test_a_run_counts_what_completed():
    result = serving_result([FIRST, SECOND, FAILED], 2.0, {})
    expected = {
        "duration": 2.0,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 12,
        "total_output_tokens": 5,
        "request_throughput": 1.0,
        "request_goodput": None,
        "output_throughput": 2.5,
        "total_token_throughput": 8.5,
        "max_output_tokens_per_s": 4.0,
        "max_concurrent_requests": 1,
        "input_lens": [7, 5, 100],
        "output_lens": [4, 1, 1],
        "errors": ["", "", "UNAVAILABLE"],
    }
    assert {name: result[name] for name in expected} == expected
    assert result["mean_ttft_ms"] == pytest.approx((200 + 900) / 2)
    assert result["mean_tpot_ms"] == pytest.approx(400 / 3)
    assert result["median_itl_ms"] == pytest.approx(150)
    assert result["std_itl_ms"] == pytest.approx(50)
    assert result["p90_e2el_ms"] == pytest.approx(600 + 0.9 * 400)
    assert result["ttfts"] == pytest.approx([0.2, 0.9, 0.1])
    assert [len(gaps) for gaps in result["itls"]] == [2, 0, 0]


def test_the_names_are_those_of_vllm_bench_serve():
    names = set(serving_result([FIRST], 1.0, {}))
    kinds = ("mean", "median", "std", "p50", "p90", "p99")
    times = {f"{kind}_{m}_ms" for kind in kinds for m in ("ttft", "tpot", "itl", "e2el")}
    counts = {
        "duration",
        "completed",
        "failed",
        "total_input_tokens",
        "total_output_tokens",
        "request_throughput",
        "request_goodput",
        "output_throughput",
        "total_token_throughput",
        "max_output_tokens_per_s",
        "max_concurrent_requests",
        "input_lens",
        "output_lens",
        "ttfts",
        "itls",
        "errors",
    }
    assert names == times | counts


def test_requests_that_overlap_are_counted_at_once():
    at = [
        RequestRecord(start_s=s, end_s=e, num_prompt_tokens=1)
        for s, e in ((0, 4), (1, 3), (2, 5), (3, 6))
    ]
    assert serving_result(at, 6.0, {})["max_concurrent_requests"] == 3


@pytest.mark.parametrize(
    ("limits", "num_good"),
    [
        ({"ttft": 1000.0}, 2),
        ({"ttft": 500.0}, 1),
        ({"ttft": 1000.0, "tpot": 100.0}, 1),  # the second has no TPOT to miss
        ({"e2el": 599.0}, 0),
    ],
)
def test_goodput_counts_requests_within_every_limit(limits, num_good):
    assert serving_result([FIRST, SECOND, FAILED], 4.0, limits)["request_goodput"] == num_good / 4


def test_no_completed_request_has_no_times():
    result = serving_result([FAILED], 1.0, {"ttft": 1.0})
    assert result["request_goodput"] == 0
    assert result["max_concurrent_requests"] == 0
    assert result["p99_ttft_ms"] is None
    assert result["mean_itl_ms"] is None


def test_percentiles_against_their_definition(rng):
    values = rng.exponential(0.1, 101)
    ordered = np.sort(values)
    figures = summary("itl", list(values))
    assert figures["p50_itl_ms"] == figures["median_itl_ms"] == pytest.approx(1e3 * ordered[50])
    assert figures["p90_itl_ms"] == pytest.approx(1e3 * ordered[90])
    assert figures["p99_itl_ms"] == pytest.approx(1e3 * ordered[99])
    assert figures["mean_itl_ms"] == pytest.approx(1e3 * math.fsum(values) / 101)


def test_goodput_is_read():
    assert parse_goodput(["ttft:200", "tpot:50.5"]) == {"ttft": 200.0, "tpot": 50.5}
    assert parse_goodput([]) == {}


@pytest.mark.parametrize(
    "items", [["ttft"], ["itl:5"], ["ttft:x"], ["ttft:0"], ["ttft:nan"], ["ttft:1", "ttft:2"]]
)
def test_another_goodput_is_refused(items):
    with pytest.raises(ConfigError, match=r"got --goodput .*; allowed is .*; write"):
        parse_goodput(items)


def test_a_result_says_how_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/depth.py", "--output", "a file"])
    path = tmp_path / "result.json"
    run = serving_result([FIRST, SECOND, FAILED], 2.0, {"ttft": 500.0})
    write_json(path, run)
    result = json.loads(path.read_text())
    assert {name: result[name] for name in run} == run
    assert result["made"] == "measured"
    assert result["command"] == "python -m benchmarks.depth --output 'a file'"
    assert result["machine"] == machine()
    assert result["machine"]["cores"] >= 1
    assert set(result["versions"]) == {"pallasite", "jax", "jaxlib"}


def test_a_result_that_is_no_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "result.json", {"ratio": math.nan})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (12345, "12,345"),
        ("decode", "decode"),
        (1234.56, "1,235"),
        (99.951, "100.0"),
        (12.345, "12.3"),
        (1.2345, "1.23"),
        (0.012345, "0.0123"),
        (0.0, "0"),
    ],
)
def test_values_for_people(value, text):
    assert shown(value) == text


def test_a_table_lines_up():
    text = table("speed", ["what", "tokens/s"], [["a", 1234.0], ["longer", None]])
    assert text.splitlines() == [
        "speed",
        "what    tokens/s",
        "------  --------",
        "a          1,234",
        "longer         -",
    ]


def test_latency_rows_hold_the_percentiles():
    rows = latency_rows(serving_result([FIRST], 1.0, {}))
    assert [row[0].split()[0] for row in rows] == ["ttft", "tpot", "itl", "e2el"]
    assert rows[3][1:] == pytest.approx([600, 0, 600, 600, 600])


def test_the_median_run_and_all_of_them():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "runs": [3.0, 1.0, 2.0]}


def test_shares_reach_one_at_the_largest():
    x, share = cumulative([3.0, 1.0, 2.0, 4.0])
    np.testing.assert_array_equal(x, [1, 2, 3, 4])
    np.testing.assert_array_equal(share, [0.25, 0.5, 0.75, 1.0])


def test_a_picture_draws_each_series_shares(monkeypatch, tmp_path):
    drawn, saved = {}, []

    class Axes:
        def step(self, x, share, where, label):
            assert where == "post"
            drawn[label] = (list(x), list(share))

        def set(self, **names):
            assert (names["title"], names["xlabel"]) == ("a title", "ms")

        def grid(self, alpha):
            pass

        def legend(self):
            pass

    class Figure:
        def __init__(self, **options):
            pass

        def subplots(self):
            return Axes()

        def savefig(self, path, **options):
            saved.append((path, options["format"]))

    # The real one is not among the tests' dependencies.
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", SimpleNamespace(Figure=Figure))
    write_plot(tmp_path / "x.png", "a title", {"TTFT": [2.0, 1.0], "ITL": [3.0]}, "ms")
    assert drawn == {"TTFT": ([1.0, 2.0], [0.5, 1.0]), "ITL": ([3.0], [1.0])}
    assert saved == [(tmp_path / "x.png", "png")]


def test_a_picture_without_matplotlib_is_refused_in_three_parts(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"got --plot.*not installed.*leave --plot out"):
        check_plot()
