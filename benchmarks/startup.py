"""How long `pallasite serve` takes to its first token, with a cold and with a warm compile cache.

Ready is when gRPC's health says SERVING; then one request is sent. The clock starts as the process
does. Weights load while programs are read or compiled, so the marks are of one clock and do not add
up. CPU time is the server's alone, without the process that compiles.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.options import benchmark_parser, engine_config, run, say
from benchmarks.processes import Said, ServerProcess, cpu_seconds_of
from pallasite.engine.config import EngineConfig
from pallasite.models.errors import ConfigError
from pallasite.proto import inference_pb2 as pb
from pallasite.server.client import Client
from pallasite.server.flags import WHOLE

GOAL_S = 3.0
"""To the first token, with a warm compile cache."""

PROMPT_LEN = 139
"""Tokens of the request, any ones."""

MARKS = {
    "first word": r"",
    "weights loaded": r"loaded (\d+) of \1 tensors",
    "programs ready": r"compiled program",
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
    result = {
        "model_id": args.model,
        "weights": config.weights,
        "cold": _spreads(cold),
        "warm": _spreads(warm),
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
        one = pb.SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        for event in client.generate(range(PROMPT_LEN), one):
            assert len(event.token_ids) == 1
        first_s = time.monotonic() - server.started_s
        times = {"SERVING": ready_s, "first token": first_s, "CPU time until SERVING": cpu_s}
        return marks(server.said) | times


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


def _show(result: dict[str, Any]) -> None:
    names = ["cold", "warm"]
    rows = [[mark, *(result[name][mark]["median"] for name in names)] for mark in result["cold"]]
    title = "seconds after the process began (median)"
    print(report.table(title, ["", "cold cache", "warm cache"], rows))
    runs = result["warm"]["first token"]
    each = ", ".join(f"{seconds:.2f}" for seconds in runs["runs"])
    print(f"\nwarm, to the first token: {runs['median']:.2f} s of {each} (goal: <= {GOAL_S:g} s)")


def _arguments() -> argparse.Namespace:
    parser = benchmark_parser("Time from `pallasite serve` to ready, and to a first token.")
    parser.add_argument(
        "--rounds", type=WHOLE, default=3, metavar="N", help="runs of each (default: 3)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
