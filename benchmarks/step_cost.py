"""Does the cost of a step grow linearly? Steps by rows, by a prompt's tokens and by cached tokens.

The engine's own programs run by hand, so that a step's time is the device's alone. Through each
series goes a line of least squares; beside its slope stands the one that the machine's own speeds,
measured in the same run, would give.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report, step_cost_page
from benchmarks.compare_turns import read_rate
from benchmarks.kernel_page import check_page, fill_in
from benchmarks.options import benchmark_parser, engine_config, run, say
from benchmarks.step_cost_fit import Kind, Speeds, Work, fit, roofline
from benchmarks.steps import StepDriver, StepTime, random_requests
from pallasite.engine.config import EngineConfig
from pallasite.engine.deployment import plan_deployment
from pallasite.engine.runtime import Runtime, load_runtime
from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.errors import ConfigError
from pallasite.models.pull import locate
from pallasite.models.weights import Matrix, declared_weights, num_bytes
from pallasite.server.flags import FILE, WHOLE

SHORT = 16
"""Tokens of the prompts of rows that decode at a short context."""

CONTEXT = 4352
"""Tokens of a context where no flag says otherwise: the longest series, and what it decodes."""

NUM_STEPS = 15
"""Of a point in a round, after WARM_STEPS that are not counted."""

WARM_STEPS = 3

NUM_PROMPTS = 3
"""Of a point in a round, one after another."""

BYTE_DOTS = {"avx512_vnni", "avx_vnni", "asimddp"}
"""Flags of machines whose dot products of bytes have four times an f32 instruction's operations."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points along one axis.

    Attributes:
        name: on the command line and in results.
        kind: what grows.
        sizes: of the points: rows, a prompt's tokens, or cached tokens a request.
        num_requests: that decode, where cached tokens grow.
        num_rounds: of all points at most; None knows no limit.
    """

    name: str
    kind: Kind
    sizes: tuple[int, ...]
    num_requests: int = 1
    num_rounds: int | None = None


SERIES = (
    Series(name="rows", kind="rows", sizes=(1, 2, 4, 8, 12, 16, 24, 32)),
    Series(name="prompt", kind="prompt", sizes=(16, 32, 64, 128, 256, 384, 512)),
    Series(name="cached-1", kind="cached", sizes=(128, 512, 1024, 2048, 3072, 4096)),
    # Prompts take most of its time.
    Series(
        name="cached-8",
        kind="cached",
        sizes=(128, 1024, 2048, 4096),
        num_requests=8,
        num_rounds=1,
    ),
)


def main() -> None:
    """Measures and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    chosen = _chosen(args.series)
    if args.rounds < 1:
        raise ConfigError(f"got --rounds {args.rounds}; it must be at least 1; raise it")
    if args.plot is not None:
        report.check_plot()
    if args.document is not None:
        check_page(args.document, step_cost_page.NAMES)
    earlier = {} if args.add_to is None else _read(args.add_to)
    config = _sized(engine_config(args))
    runtime = load_runtime(args.model, config, say)
    made = report.provenance()
    result = made | {"model_id": args.model, "weights": config.weights}
    work = work_of(args.model, config)
    series = {}
    for one in chosen:
        before = machine_speeds()
        points = measure(one, runtime, config, args.rounds)
        speeds = before.best(machine_speeds())
        origin = {"command": made["command"], "date": made["date"]}
        series[one.name] = origin | figures(one, points, work, speeds)
    for name in ("model_id", "weights", "machine"):
        if earlier and earlier[name] != result[name]:
            raise ConfigError(
                f"got an earlier result with another {name}; both must have the same; measure all"
                " series again"
            )
    both = {**earlier.get("series", {}), **series}
    result["series"] = {one.name: both[one.name] for one in SERIES if one.name in both}
    for table in step_cost_page.tables(result)[1:]:
        print(report.table(table.title, table.headers, table.rows), end="\n\n")
    if args.output is not None:
        report.write_json(args.output, result)
    if args.plot is not None:
        step_cost_page.draw(args.plot, result)
    if args.document is not None:
        fill_in(args.document, step_cost_page.tables(result))


def measure(
    series: Series, runtime: Runtime, config: EngineConfig, rounds: int
) -> list[dict[str, Any]]:
    """Returns the points of a series: what grows, and the seconds of the steps.

    Leaves out sizes that the engine has no room for. Raises ConfigError where fewer than two are
    left. All points are measured once a round, so that slow changes of the machine reach all.
    """
    most = {
        "rows": config.max_requests,
        "prompt": config.max_batch_tokens,
        "cached": runtime.max_context_len - NUM_STEPS - WARM_STEPS - 2 * series.num_requests,
    }[series.kind]
    sizes = [size for size in series.sizes if size <= most]
    if len(sizes) < 2 or series.num_requests > config.max_requests:
        raise ConfigError(
            f"got an engine with room for {sizes} of the series {series.name}; a line needs two"
            " points; give it more room, or choose other series"
        )
    driver = StepDriver(runtime, config)
    _steps(series, sizes[0], driver, runtime, config)  # what a first run loads is no step's
    found: dict[int, list[StepTime]] = {size: [] for size in sizes}
    if series.num_rounds is not None:
        rounds = min(rounds, series.num_rounds)
    for number in range(rounds):
        for size in sizes:
            say(f"{series.name}, round {number + 1} of {rounds}: {size}")
            found[size] += _steps(series, size, driver, runtime, config)
    return [_point(series, steps) for steps in found.values()]


def _steps(
    series: Series, size: int, driver: StepDriver, runtime: Runtime, config: EngineConfig
) -> list[StepTime]:
    if series.kind == "prompt":
        prompts = random_requests(runtime, NUM_PROMPTS, size, 1)
        return [step for prompt in prompts for step in driver.run([prompt])]
    is_rows = series.kind == "rows"
    num_requests = size if is_rows else series.num_requests
    prompt_len = SHORT if is_rows else size
    # The first requests decode while the last ones' prompts are still computed.
    num_prefills = -(-num_requests * prompt_len // (config.max_batch_tokens - num_requests))
    wanted = num_prefills + WARM_STEPS + NUM_STEPS + 1
    max_tokens = min(wanted, runtime.max_context_len - prompt_len)
    times = driver.run(random_requests(runtime, num_requests, prompt_len, max_tokens))
    full = [
        step for step in times if not step.bucket.has_prefill and step.num_tokens == num_requests
    ]
    return full[WARM_STEPS:][:NUM_STEPS]


def _point(series: Series, steps: Sequence[StepTime]) -> dict[str, Any]:
    size = np.mean([step.num_cached for step in steps])
    if series.kind != "cached":
        size = np.mean([step.num_tokens for step in steps])
    return {
        "size": float(size),
        "program": str(steps[0].bucket),
        "seconds": report.spread([step.device_s for step in steps]),
    }


def figures(
    series: Series, points: Sequence[dict[str, Any]], work: Work, speeds: Speeds
) -> dict[str, Any]:
    """Returns what is told of a series: its points, their line, and the machine's."""
    line = fit([p["size"] for p in points], [p["seconds"]["median"] for p in points])
    start_s, slope_s = roofline(work, speeds, series.kind)
    return {
        "kind": series.kind,
        "num_requests": series.num_requests,
        "points": list(points),
        "line": asdict(line),
        "roofline": {"start": start_s, "slope": slope_s},
        "slope_to_roofline": line.slope / slope_s,
        "work": asdict(work),
        "speeds": asdict(speeds),
    }


def work_of(model: str, config: EngineConfig) -> Work:
    """Returns what a step of a model cannot do without."""
    deployment = plan_deployment(open_checkpoint(locate(model)).config, config)
    row = head = 0
    for _, weight in declared_weights(deployment.model):
        if isinstance(weight, Matrix):
            *_, num_rows, num_inputs = weight.source.shape
            start, end = weight.source.rows or (0, num_rows)
            count = 2 * (end - start) * num_inputs
            if weight.source.is_stacked:
                row += count * deployment.cache_spec.partition.config.num_layers
            else:  # the embedding, too, where the output matrix is another: its rows are looked up
                head = count
    spec = deployment.cache_spec
    return Work(
        weight_bytes=num_bytes(deployment.model),
        row_operations=row,
        head_operations=head,
        cached_bytes=spec.page_bytes // spec.target.page_size,
    )


def machine_speeds(size: int = 2048, rounds: int = 3, num_bytes: int = 1 << 30) -> Speeds:
    """Returns the best of `rounds` reads of `num_bytes` and f32 products of `size`, by NumPy.

    All cores are in use. The products' rate is taken times four where BYTE_DOTS says so: the
    bodies' dot products take four bytes where an instruction of the same width takes one float.
    """
    x = np.random.default_rng(0).standard_normal((size, size), np.float32)
    times = []
    for _ in range(rounds + 1):
        start_s = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start_s)
    cpus = Path("/proc/cpuinfo")
    num_threads = len(os.sched_getaffinity(0))
    flags = set(cpus.read_text().split()) if cpus.exists() else set()
    factor = 4 if flags & BYTE_DOTS else 1
    return Speeds(
        read=max(read_rate(num_threads, num_bytes) for _ in range(rounds)),
        operations=factor * 2 * size**3 / min(times[1:]),
    )


def _sized(config: EngineConfig) -> EngineConfig:
    context = config.max_context_len or CONTEXT
    most = max(series.num_requests for series in SERIES)
    cache = config.cache_tokens if config.num_pages else config.cache_tokens or most * context
    return replace(config, max_context_len=context, cache_tokens=cache)


def _chosen(names: Sequence[str] | None) -> list[Series]:
    known = {series.name: series for series in SERIES}
    for name in names or ():
        if name not in known:
            raise ConfigError(
                f"got --series {name!r}; allowed are {', '.join(known)}; check the spelling"
            )
    return [known[name] for name in names or known]


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
        if not {"model_id", "weights", "machine", "series"} <= {*result}:
            raise ValueError
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"got {path.name!r}, which is no result of this benchmark; it must be one that --output"
            " wrote; name another"
        ) from error
    return dict(result)


def _arguments() -> argparse.Namespace:
    parser = benchmark_parser("How a step's time grows with rows and with cached tokens.")
    parser.add_argument(
        "--series",
        nargs="+",
        metavar="NAME",
        help=f"measure these (default: {' '.join(series.name for series in SERIES)})",
    )
    parser.add_argument(
        "--rounds", type=WHOLE, default=3, metavar="N", help="of each series at most (default: 3)"
    )
    parser.add_argument(
        "--add-to",
        type=FILE,
        metavar="FILE",
        help="take from this earlier result the series not measured now (default: none)",
    )
    parser.add_argument(
        "--plot", type=FILE, metavar="FILE", help="draw the series as a PNG (default: do not)"
    )
    parser.add_argument(
        "--document",
        type=FILE,
        metavar="FILE",
        help="fill in the tables of a page (default: do not)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
