"""What LoRA adapters cost a decode step: all rows full, without adapters and with many at once."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import report
from benchmarks.options import Workload, benchmark_parser, engine_config, run, say
from benchmarks.steps import StepDriver
from pallasite.engine.runtime import HostAdapter, Runtime, load_runtime
from pallasite.models.adapters import HostLowRank
from pallasite.models.errors import ConfigError
from pallasite.server.flags import TEXT, WHOLE

GOAL = 1.15


def main() -> None:
    """Measures and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    if min(args.num_adapters, args.rank, args.rounds) < 1:
        raise ConfigError(
            "got a number below 1 of adapters, ranks or rounds; each must be at least 1; raise it"
        )
    config = engine_config(args)
    room = replace(config, max_adapters=args.num_adapters, max_adapter_rank=args.rank)
    plain, roomy = (load_runtime(args.model, each, say) for each in (config, room))
    rng = np.random.default_rng(0)
    targets = args.targets.split(",")
    for slot in range(args.num_adapters):
        roomy.set_adapter(_random(roomy, targets, rng), slot)
    workload = Workload(num_prompts=config.max_requests, input_len=8, output_len=args.output_len)
    requests = workload.requests(plain.model_config.vocab_size)
    slots = [index % args.num_adapters for index in range(len(requests))]
    drivers = {
        "no room for adapters": (StepDriver(plain, config), None),
        "room, none in use": (StepDriver(roomy, room), None),
        f"{args.num_adapters} in use": (StepDriver(roomy, room), slots),
    }
    times: dict[str, list[float]] = {name: [] for name in drivers}
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}")
        for name, (driver, own) in drivers.items():
            steps = driver.run(requests, own)
            # The first decode step of a round warms the caches.
            times[name] += [step.device_s for step in steps if not step.bucket.has_prefill][1:]
    spread = {name: report.spread(values) for name, values in times.items()}
    base = spread["no room for adapters"]["median"]
    result: dict[str, Any] = {
        "model_id": args.model,
        "weights": config.weights,
        "num_requests": len(requests),
        "num_adapters": args.num_adapters,
        "rank": args.rank,
        "targets": targets,
        "step_s": spread,
        "ratio": {name: values["median"] / base for name, values in spread.items()},
    }
    _show(result)
    if args.output is not None:
        report.write_json(args.output, result)


def _random(runtime: Runtime, targets: Sequence[str], rng: np.random.Generator) -> HostAdapter:
    """Returns an adapter of random numbers, which changes the matrices that `targets` name."""
    known = runtime.adapter_shapes()
    if not any(target in key for key in known for target in targets):
        raise ConfigError(
            f"got targets {', '.join(targets)}; allowed are parts of {', '.join(known)}; choose"
            " some"
        )
    adapter = {}
    for key, like in known.items():
        if any(target in key for target in targets):
            a, b = (0.02 * rng.standard_normal(part.shape) for part in (like.a, like.b))
            adapter[key] = HostLowRank(a.astype(np.float32), b.astype(np.float32))
    return adapter


def _show(result: dict[str, Any]) -> None:
    rows = [
        [name, 1e3 * values["median"], result["ratio"][name]]
        for name, values in result["step_s"].items()
    ]
    title = (
        f"a decode step of {result['num_requests']} rows, rank {result['rank']} on"
        f" {', '.join(result['targets'])} (median)"
    )
    print(report.table(title, ["", "ms", "ratio"], rows))
    ratio = result["ratio"][f"{result['num_adapters']} in use"]
    print(f"\nwith {result['num_adapters']} adapters: {ratio:.3f} (goal: <= {GOAL:g})")


def _arguments() -> argparse.Namespace:
    parser = benchmark_parser("What adapters cost a decode step.")
    for name, default, text in (
        ("--num-adapters", 16, "adapters, dealt to the requests in turn"),
        ("--rank", 8, "of each"),
        ("--rounds", 3, "of each way"),
        ("--output-len", 24, "decode steps of a round"),
    ):
        parser.add_argument(
            name, type=WHOLE, metavar="N", default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--targets",
        type=TEXT,
        metavar="NAME,NAME,...",
        default="q_proj,v_proj",
        help="the matrices that adapters change (default: q_proj,v_proj, which is PEFT's)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
