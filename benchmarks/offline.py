"""The engine without a server: throughput, prefill speed, and the time of every program's step."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.options import (
    WORKLOAD_FLAGS,
    Workload,
    benchmark_parser,
    engine_config,
    run,
    say,
)
from benchmarks.processes import timed_generate
from benchmarks.steps import StepTime, time_buckets
from pallasite.engine.engine import Engine
from pallasite.engine.runtime import load_runtime
from pallasite.models.errors import ConfigError
from pallasite.server.flags import WHOLE, add_flags, read_flags

BATCHES = (1, 8, 32)
PREFILLS = (128, 512, 2048)
NUM_STEPS = 20
PARTS = ("schedule", "build", "launch", "wait", "commit")


def main() -> None:
    """Measures and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    if args.rounds < 1:
        raise ConfigError(f"got --rounds {args.rounds}; it must be at least 1; raise it")
    workload = read_flags(args, Workload, WORKLOAD_FLAGS)
    config = engine_config(args)
    runtime = load_runtime(args.model, config, say)
    say("timing the step of every program")
    steps = time_buckets(runtime, config, workload.input_len, NUM_STEPS)
    runtime.reset()
    with Engine(runtime, config) as engine:
        result = {
            "model_id": args.model,
            "weights": config.weights,
            "input_len": workload.input_len,
            "output_len": workload.output_len,
            "steps": {str(bucket): _step_figures(times) for bucket, times in steps.items()},
            "throughput": _throughput(engine, workload, args.rounds),
            "prefill": _prefill(engine, workload, args.rounds),
            "compilations": engine.metrics.compilations,
            "misses": engine.metrics.misses,
        }
    _show(result)
    if args.output is not None:
        report.write_json(args.output, result)


def _step_figures(times: list[StepTime]) -> dict[str, float]:
    """Returns medians in milliseconds, by part."""
    figures = {
        f"{part}_ms": 1000 * float(np.median([getattr(time, f"{part}_s") for time in times]))
        for part in ("device", "cpu", "host", *PARTS)
    }
    return {"num_tokens": times[0].num_tokens, "num_steps": len(times)} | figures


def _throughput(engine: Engine, workload: Workload, rounds: int) -> dict[str, Any]:
    """Returns output tokens a second by the number of requests, which all begin at once."""
    figures: dict[str, Any] = {}
    for size in BATCHES:
        load = replace(workload, num_prompts=size)
        requests = load.requests(engine.model_config.vocab_size)
        say(f"throughput of {size} requests")
        runs = [timed_generate(engine, requests).output_throughput for _ in range(rounds + 1)]
        figures[str(size)] = report.spread(runs[1:])
    return figures


def _prefill(engine: Engine, workload: Workload, rounds: int) -> dict[str, Any]:
    """Returns prompt tokens a second by prompt length, one prompt at a time."""
    figures: dict[str, Any] = {}
    for length in PREFILLS:
        if length >= engine.max_context_len:
            say(f"left out a prompt of {length}: a context has {engine.max_context_len} tokens")
            continue
        load = replace(workload, num_prompts=1, input_len=length, output_len=1)
        requests = load.requests(engine.model_config.vocab_size)
        say(f"prefill of {length} tokens")
        runs = [timed_generate(engine, requests).duration_s for _ in range(rounds + 1)]
        figures[str(length)] = report.spread([length / seconds for seconds in runs[1:]])
    return figures


def _show(result: dict[str, Any]) -> None:
    names = ("device_ms", "cpu_ms", "host_ms", *(f"{part}_ms" for part in PARTS))
    rows = [
        [bucket, *(figures[name] for name in names), 1e3 * _per_ms(figures)]
        for bucket, figures in result["steps"].items()
    ]
    headers = ["program", "device", "cpu", "host", *PARTS, "tokens/s"]
    print(report.table("a step without overlap, ms (median)", headers, rows))
    for name, title in (
        ("throughput", "output tokens/s by requests at once"),
        ("prefill", "prompt tokens/s by prompt length"),
    ):
        rows = [[size, value["median"], *value["runs"]] for size, value in result[name].items()]
        if not rows:
            continue
        runs = [f"run {number}" for number in range(1, len(rows[0]) - 1)]
        print(report.table(f"\n{title}", ["", "median", *runs], rows))
    print(f"\ncompiled since the start: {result['compilations']}, misses: {result['misses']}")


def _per_ms(figures: dict[str, float]) -> float:
    return figures["num_tokens"] / (figures["device_ms"] + figures["host_ms"])


def _arguments() -> argparse.Namespace:
    parser = benchmark_parser("The engine without a server.")
    add_flags(parser, "load", Workload, WORKLOAD_FLAGS)
    parser.add_argument(
        "--rounds", type=WHOLE, default=3, metavar="N", help="runs of each (default: 3)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
