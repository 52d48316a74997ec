"""How compiling grows with depth: models of the same widths and of 2 and 30 layers.

Every program that a server compiles is compiled here, as it does it, but from shapes alone: no
weights are loaded meanwhile, and no checkpoint of either depth is needed.
"""

import argparse
import multiprocessing
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.options import benchmark_parser, engine_config, run, say
from pallasite.engine.config import EngineConfig
from pallasite.engine.deployment import plan_deployment
from pallasite.engine.programs import Programs
from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.config import ModelConfig
from pallasite.models.errors import ConfigError
from pallasite.models.pull import locate
from pallasite.server.flags import WHOLE

GOAL = 1.5
DEPTHS = (2, 30)


def main() -> None:
    """Measures and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    if args.rounds < 1:
        raise ConfigError(f"got --rounds {args.rounds}; it must be at least 1; raise it")
    # A compile cache would be asked for what is to be timed.
    config = replace(engine_config(args), compile_cache=None)
    widths = open_checkpoint(locate(args.model)).config
    runs: dict[int, list[dict[str, float]]] = {layers: [] for layers in DEPTHS}
    for number in range(args.rounds):
        for layers in DEPTHS:
            say(f"round {number + 1} of {args.rounds}: compiling {layers} layers")
            runs[layers].append(_compile(replace(widths, num_layers=layers), config))
    by_layers = {
        str(layers): {name: report.spread([each[name] for each in times]) for name in times[0]}
        for layers, times in runs.items()
    }
    few, many = (by_layers[str(layers)] for layers in DEPTHS)
    result = {
        "model_id": args.model,
        "weights": config.weights,
        "by_layers": by_layers,
        "ratio": {name: many[name]["median"] / few[name]["median"] for name in few},
    }
    _show(result)
    if args.output is not None:
        report.write_json(args.output, result)


def _compile(model: ModelConfig, config: EngineConfig) -> dict[str, float]:
    """Compiles in a process of its own, which has compiled nothing before."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_compile, args=(theirs, model, config))
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


def _run_compile(connection: Connection, model: ModelConfig, config: EngineConfig) -> None:
    deployment = plan_deployment(model, config)
    if deployment.cache_spec.num_pages == 0:
        # An accelerator's cache takes what is left; any size compiles in the same time.
        deployment = deployment.with_pages(config.max_requests)
    programs = Programs(deployment.program_spec())
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    programs.compile(say)
    clock_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_start_s
    connection.send({"clock_s": clock_s, "cpu_s": cpu_s})


def _show(result: dict[str, Any]) -> None:
    names = {"clock_s": "by the clock", "cpu_s": "CPU time"}
    rows = [
        [f"{layers} layers", *(times[name]["median"] for name in names)]
        for layers, times in result["by_layers"].items()
    ]
    rows.append(["ratio", *(result["ratio"][name] for name in names)])
    title = "compiling every program without a cache, s (median)"
    print(report.table(title, ["", *names.values()], rows))
    print(f"\n{DEPTHS[1]} / {DEPTHS[0]}: {result['ratio']['clock_s']:.2f} (goal: <= {GOAL:g})")


def _arguments() -> argparse.Namespace:
    parser = benchmark_parser("Compile time by depth.")
    parser.add_argument(
        "--rounds", type=WHOLE, default=3, metavar="N", help="runs of each (default: 3)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
