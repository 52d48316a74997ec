"""The benchmarks as they are run, on a tiny model: they end, and their figures add up."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pallasite.pallas_kernels.cpu import best_instructions
from tests.tiny_checkpoints import TINY, random_tensors, write_hf

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ("--max-requests", "2", "--max-batch-tokens", "32", "--max-context-len", "160")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("model"), TINY, random_tensors(TINY))


def run_benchmark(name, model, output, *flags, cache):
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", model, *SMALL, *flags]
    command += ["--compile-cache", cache, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done.stdout


def test_serving_beside_offline(model, tmp_path, compile_cache):
    flags = ("--num-prompts", "3", "--input-len", "20", "--output-len", "8", "--rounds", "2")
    flags += ("--concurrency", "2", "--goodput", "ttft:1e9", "e2el:1e9")
    result, text = run_benchmark(
        "serving", model, tmp_path / "out.json", *flags, cache=compile_cache
    )
    assert result["completed"] == 3
    assert result["failed"] == 0
    assert result["total_input_tokens"] == 60
    assert result["total_output_tokens"] == 24
    assert result["output_throughput"] == pytest.approx(24 / result["duration"])
    assert result["request_goodput"] == pytest.approx(3 / result["duration"])
    assert result["max_concurrent_requests"] == 2
    assert 0 < result["p50_ttft_ms"] <= result["p99_ttft_ms"] < result["p99_e2el_ms"]
    served, offline = (result[f"{x}_output_throughput"] for x in ("served", "offline"))
    assert len(served["runs"]) == len(offline["runs"]) == 2
    assert all(seconds > 0 for seconds in result["client_cpu_s"]["runs"])
    for name in ("served", "offline"):
        assert all(0 <= seconds < 60 for seconds in result[f"{name}_cpu_s"]["runs"])
        assert len(result[f"{name}_others_cores"]["runs"]) == 2
    ratio = np.median(served["runs"]) / np.median(offline["runs"])
    assert result["served_to_offline"] == pytest.approx(ratio)
    assert f"served / offline: {ratio:.3f}" in text


def test_offline_times_every_program(model, tmp_path, compile_cache):
    flags = ("--input-len", "20", "--output-len", "4", "--rounds", "1")
    result, _ = run_benchmark("offline", model, tmp_path / "out.json", *flags, cache=compile_cache)
    # Without a body in C++ no product has one row.
    of_one = {"decode of 1 tokens"} if best_instructions() else set()
    assert set(result["steps"]) == {*of_one, "decode of 2 tokens", "mixed of 32 tokens"}
    for step in result["steps"].values():
        assert step["num_steps"] >= 20
        assert step["device_ms"] >= step["wait_ms"] > 0
        assert 0 < step["host_ms"] < 1000
    assert [*result["throughput"]] == ["1", "8", "32"]
    assert [*result["prefill"]] == ["128"]
    assert (result["compilations"], result["misses"]) == (0, 0)


def test_a_bad_flag_ends_with_2_and_three_parts():
    command = [sys.executable, ROOT / "benchmarks" / "serving.py", "--goodput", "speed:3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks: got --goodput 'speed:3'; allowed is ")
    assert done.stdout == ""


def test_adapters_cost_what_their_steps_take(model, tmp_path, compile_cache):
    flags = ("--num-adapters", "2", "--rank", "2", "--rounds", "1", "--output-len", "6")
    result, text = run_benchmark(
        "adapters", model, tmp_path / "out.json", *flags, cache=compile_cache
    )
    assert list(result["ratio"]) == ["no room for adapters", "room, none in use", "2 in use"]
    base = result["step_s"]["no room for adapters"]["median"]
    for name, spread in result["step_s"].items():
        assert len(spread["runs"]) == 4
        assert result["ratio"][name] == pytest.approx(spread["median"] / base)
    assert f"with 2 adapters: {result['ratio']['2 in use']:.3f}" in text


def test_speculation_is_compared_with_none_on_every_load(model, tmp_path, compile_cache):
    flags = ("--rounds", "2", "--output-len", "12", "--speculate-tokens", "3")
    flags += ("--max-context-len", "512", "--max-batch-tokens", "64")
    result, text = run_benchmark(
        "speculation", model, tmp_path / "out.json", *flags, cache=compile_cache
    )
    assert len(result["loads"]) == 6
    for name, load in result["loads"].items():
        assert f"{name} " in text
        assert len(load["without_s"]["runs"]) == len(load["with_s"]["runs"]) == 2
        ratio = load["without_s"]["median"] / load["with_s"]["median"]
        assert load["speed_up"] == pytest.approx(ratio)
        assert 0 <= load["accepted_tokens"] <= load["draft_tokens"] <= 3 * load["num_drafts"]
        assert 0 <= load["acceptance"] <= 1 <= load["mean_accepted_len"] <= 4
        assert load["output_tokens"] > 0
    assert (result["compilations"], result["misses"], result["speculate_tokens"]) == (0, 0, 3)
