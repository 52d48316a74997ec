"""How long `pallasite serve` takes to be ready, cold and warm, and how compiling grows with depth.

Ready is when gRPC's health says SERVING; the clock starts as the process does. Weights load while
programs compile, so the marks are of one clock and do not add up.
"""

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.options import benchmark_parser, engine_config, run, say
from benchmarks.processes import Said, ServerProcess, cpu_seconds_of
from pallasite.engine.config import EngineConfig
from pallasite.engine.runtime import load_runtime
from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.errors import ConfigError
from pallasite.models.pull import locate
from pallasite.server.client import Client
from pallasite.server.flags import WHOLE
from tests.tiny_checkpoints import random_tensors, write_hf

WARM_GOAL_S = 5.0
DEPTH_GOAL = 1.5
DEPTHS = (2, 30)
MARKS = {
    "first word": r"",
    "weights loaded": r"loaded (\d+) of \1 tensors",
    "programs compiled": r"compiled program",
    "listening": r"is served on",
}
"""The last line that each matches is the mark, but of the first its first."""


def main() -> None:
    """Measures and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    if args.rounds < 1:
        raise ConfigError(f"got --rounds {args.rounds}; it must be at least 1; raise it")
    config = engine_config(args)
    with tempfile.TemporaryDirectory(prefix="pallasite-") as folder:
        cold, warm = [], []
        for number in range(args.rounds):
            cached = replace(config, compile_cache=Path(folder, f"cache-{number}"))
            say(f"round {number + 1} of {args.rounds}: cold, then warm")
            cold.append(_start(args.model, cached))
            warm.append(_start(args.model, cached))
        depths = _compile_by_depth(args.model, config, Path(folder), args.rounds)
    seconds = {
        layers: report.spread([run["compile_s"] for run in runs]) for layers, runs in depths.items()
    }
    few, many = (seconds[layers]["median"] for layers in DEPTHS)
    result = {
        "model_id": args.model,
        "weights": config.weights,
        "cold": _spreads(cold),
        "warm": _spreads(warm),
        "compile_s_by_layers": {str(layers): value for layers, value in seconds.items()},
        "cpu_s_by_layers": {
            str(layers): report.spread([run["cpu_s"] for run in runs])
            for layers, runs in depths.items()
        },
        "compile_ratio": many / few,
    }
    _show(result)
    if args.output is not None:
        report.write_json(args.output, result)


def _start(model: str, config: EngineConfig) -> dict[str, float]:
    """Starts a server and stops it; returns its marks, in seconds after the process began.

    Beside them stands the CPU time of all its threads, to which others on the machine do not add.
    """
    with ServerProcess(model, config) as server, Client(server.address) as client:
        if not client.wait_until_ready(60.0):
            raise ConfigError("got a server that listens and is not ready; it must be within 60 s")
        ready_s = time.monotonic() - server.started_s
        cpu_s = cpu_seconds_of(server.pid)
        return marks(server.said) | {"SERVING": ready_s, "CPU time until then": cpu_s}


def marks(said: Sequence[Said]) -> dict[str, float]:
    """Returns when each of MARKS was reached. Raises ConfigError where one never was."""
    found = {"first word": said[0].after_s} if said else {}
    for name, pattern in MARKS.items():
        times = [line.after_s for line in said if re.search(pattern, line.text)]
        if not times:
            raise ConfigError(
                f"got no mark {name!r} in what the server said; it says it at each start; see"
                " whether its words have changed"
            )
        found.setdefault(name, times[-1])
    return found


def _spreads(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {name: report.spread([run[name] for run in runs]) for name in runs[0]}


def _compile_by_depth(
    model: str, config: EngineConfig, folder: Path, rounds: int
) -> dict[int, list[dict[str, float]]]:
    """Compiles models of the same widths and of each of DEPTHS, in turns, without a cache."""
    widths = open_checkpoint(locate(model)).config
    config = replace(config, compile_cache=None)
    paths = {}
    for layers in DEPTHS:
        say(f"writing a random model of {layers} layers")
        shape = replace(widths, num_layers=layers)
        path = Path(folder, f"{layers}-layers")
        paths[layers] = write_hf(path, shape, random_tensors(shape), dtype="BF16")
    runs: dict[int, list[dict[str, float]]] = {layers: [] for layers in DEPTHS}
    for number in range(rounds):
        for layers in DEPTHS:
            say(f"round {number + 1} of {rounds}: compiling {layers} layers")
            runs[layers].append(_compile(paths[layers], config))
    return runs


def _compile(path: Path, config: EngineConfig) -> dict[str, float]:
    """Compiles in a process of its own, which has compiled nothing before."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_compile, args=(theirs, path, config))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        raise ConfigError(
            "got no answer from the process that compiles, which has ended; what it said stands"
            " above; mend that and try again"
        ) from None
    finally:
        process.join()
    assert isinstance(answer, dict)
    return answer


def _run_compile(connection: Connection, path: Path, config: EngineConfig) -> None:
    said: list[str] = []
    start_s = time.process_time()
    load_runtime(path, config, said.append)
    cpu_s = time.process_time() - start_s
    connection.send({"compile_s": compile_seconds(said), "cpu_s": cpu_s})


def compile_seconds(said: Sequence[str]) -> float:
    """Returns the seconds that compiling took, as the engine's last words on it say."""
    found = [re.fullmatch(r"compiled program .*, ([0-9.]+) s", text) for text in said]
    seconds = [float(match[1]) for match in found if match]
    if not seconds:
        raise ConfigError(
            "got no word on compiling from the engine; it says `compiled program ...` after each;"
            " see whether its words have changed"
        )
    return seconds[-1]


def _show(result: dict[str, Any]) -> None:
    names = ["cold", "warm"]
    rows = [[mark, *(result[name][mark]["median"] for name in names)] for mark in result["cold"]]
    title = "seconds after the process began (median)"
    print(report.table(title, ["", "cold cache", "warm cache"], rows))
    runs = result["warm"]["SERVING"]
    each = ", ".join(f"{seconds:.2f}" for seconds in runs["runs"])
    print(f"\nwarm, to SERVING: {runs['median']:.2f} s of {each} (goal: <= {WARM_GOAL_S:g} s)")
    rows = [
        [f"{layers} layers", times["median"], result["cpu_s_by_layers"][layers]["median"]]
        for layers, times in result["compile_s_by_layers"].items()
    ]
    print(report.table("\ncompiling without a cache, s", ["", "by the clock", "CPU time"], rows))
    ratio = result["compile_ratio"]
    print(f"\n{DEPTHS[1]} layers / {DEPTHS[0]} layers: {ratio:.2f} (goal: <= {DEPTH_GOAL:g})")


def _arguments() -> argparse.Namespace:
    parser = benchmark_parser("Time from `pallasite serve` to ready, and compile time by depth.")
    parser.add_argument(
        "--rounds", type=WHOLE, default=3, metavar="N", help="runs of each (default: 3)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
