"""Where a step's time goes: each operation's time, and how near it comes to the memory's speed.

JAX's profiler runs while the steps of one program do. Its events are the program's instructions;
what they are of in the model is what the compiled program says. Products that the CPU's bodies do
have the bytes of their matrices counted from the program's shapes, and stand beside a read of
memory that is measured in the same run.
"""

import argparse
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.compare_turns import read_rate
from benchmarks.options import benchmark_parser, engine_config, run, say
from benchmarks.steps import StepDriver
from pallasite.engine.layout import Bucket
from pallasite.engine.request import Request, SamplingParams
from pallasite.engine.runtime import load_runtime
from pallasite.models.errors import ConfigError
from pallasite.server.flags import WHOLE

_ITEM_BYTES = {"u8": 1, "s8": 1, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}

WARM_STEPS = 3


@dataclass(frozen=True)
class Operation:
    """An instruction of a program.

    Attributes:
        name: its place in the model.
        matrix_bytes: of the matrices that a call of it reads; 0 where it is no product's body.
    """

    name: str
    matrix_bytes: int


def main() -> None:
    """Measures and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    config = engine_config(args)
    most = config.max_requests
    if not 1 <= args.requests <= most:
        raise ConfigError(
            f"got --requests {args.requests}; allowed are 1 to --max-requests, {most}; choose one"
            " of them"
        )
    runtime = load_runtime(args.model, config, say)
    driver = StepDriver(runtime, config)
    rng = np.random.default_rng(args.seed)
    num_steps = 1 if args.prefill else args.steps
    shape = (args.requests, args.input_len)
    prompts = rng.integers(0, runtime.model_config.vocab_size, shape).tolist()
    most_tokens = 1 if args.prefill else WARM_STEPS + num_steps + args.requests * args.input_len
    params = SamplingParams(
        max_tokens=min(most_tokens, runtime.max_context_len - args.input_len),
        temperature=0.0,
        ignore_eos=True,
    )
    requests = [Request(prompt_ids=tuple(prompt), params=params) for prompt in prompts]
    if args.prefill:
        driver.run(requests)  # what a first run loads is no part of a step
    driver.add(requests)
    if not args.prefill:
        while (step := driver.step()) is not None and step.num_tokens != args.requests:
            say("computing the prompts")
        for _ in range(WARM_STEPS):
            driver.step()
    say("profiling")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps = [driver.step() for _ in range(num_steps)]
        spent = _spent(Path(folder))
    (bucket,) = {step.bucket for step in steps if step is not None}
    text = runtime.programs.step(bucket).as_text()
    assert text is not None
    rows = _rows(spent, operations(text, runtime.model_config.num_layers), num_steps)
    read = read_rate(2)
    step_s = float(np.median([step.device_s for step in steps if step is not None]))
    result = {
        "model_id": args.model,
        "program": _shown(bucket),
        "requests": args.requests,
        "input_len": args.input_len,
        "step_ms": 1e3 * step_s,
        "read_bytes_per_s": read,
        "operations": rows,
    }
    _show(result)
    if args.output is not None:
        report.write_json(args.output, result)


def operations(hlo: str, num_layers: int) -> dict[str, Operation]:
    """Returns what a compiled program's text says of each instruction.

    A stack of `num_layers` matrices is read one at a time.
    """
    shapes: dict[str, str] = {}
    found: dict[str, Operation] = {}
    for line in hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (\S+) (.*)", line)
        if match is None:
            continue
        name, shape, rest = match.groups()
        shapes[name] = shape
        place = re.search(r'op_name="([^"]*)"', rest)
        num_bytes = 0
        if 'custom_call_target="pallasite_multiply"' in rest:
            operands = re.findall(
                r"%([\w.-]+)", rest.partition("custom-call(")[2].partition(")")[0]
            )
            num_bytes = sum(_matrix_bytes(shapes.get(each, ""), num_layers) for each in operands)
        found[name] = Operation(place[1] if place else "", num_bytes)
    return found


def _matrix_bytes(shape: str, num_layers: int) -> int:
    """The bytes that a call reads of an operand in strips; 0 for any other."""
    match = re.match(r"(\w+)\[([\d,]+)\]", shape)
    if match is None or match[1] not in ("u8", "u16", "f16"):
        return 0
    sizes = [int(size) for size in match[2].split(",")]
    # One axis more than one layer's: [strips, groups, n, 16, 4], [strips, n, 16, 2], scales' three.
    is_stacked = len(sizes) > {"u8": 5, "u16": 4, "f16": 3}[match[1]]
    size = int(np.prod(sizes)) * _ITEM_BYTES[match[1]]
    return size // num_layers if is_stacked else size


def _spent(folder: Path) -> dict[str, tuple[float, int]]:
    """Returns each instruction's seconds and calls."""
    (path,) = folder.glob("**/*.xplane.pb")
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                seconds[event.name] += event.duration_ns / 1e9
                calls[event.name] += 1
    return {name: (seconds[name], calls[name]) for name in seconds}


def _rows(
    spent: Mapping[str, tuple[float, int]], known: Mapping[str, Operation], num_steps: int
) -> list[dict[str, Any]]:
    """One row an instruction of the program, the longest first; loops are their parts' sums."""
    rows = [
        {
            "operation": _short(known[name].name) or name,
            "instruction": name,
            "ms_per_step": 1e3 * seconds / num_steps,
            "calls_per_step": calls / num_steps,
            "us_per_call": 1e6 * seconds / calls,
            "matrix_bytes": known[name].matrix_bytes,
            "bytes_per_s": known[name].matrix_bytes * calls / seconds or None,
        }
        for name, (seconds, calls) in spent.items()
        if name in known and not name.startswith(("while", "cond", "call"))
    ]
    return sorted(rows, key=lambda row: -row["ms_per_step"])


def _short(place: str) -> str:
    """The last parts of an operation's place: what is called, and within what."""
    parts = [part for part in place.split("/") if part not in ("while", "body", "closed_call")]
    return "/".join(parts[-3:])


def _shown(bucket: Bucket) -> str:
    return f"{'mixed' if bucket.has_prefill else 'decode'} of {bucket.num_tokens} tokens"


def _show(result: Mapping[str, Any]) -> None:
    read = result["read_bytes_per_s"]
    listed = [row for row in result["operations"] if row["ms_per_step"] >= 0.01]
    total = sum(row["ms_per_step"] for row in result["operations"])
    rows = [
        [
            f"{row['operation']} ({row['instruction']})",
            row["ms_per_step"],
            100 * row["ms_per_step"] / total,
            row["calls_per_step"],
            row["us_per_call"],
            None if row["bytes_per_s"] is None else row["bytes_per_s"] / 1e9,
            None if row["bytes_per_s"] is None else 100 * row["bytes_per_s"] / read,
        ]
        for row in listed
    ]
    headers = ["operation", "ms a step", "%", "calls", "us a call", "GB/s", "% of a read"]
    title = f"{result['program']}, measured by JAX's profiler, which slows it down"
    print(report.table(title, headers, rows))
    print(f"\noperations together {total:.2f} ms a step; the step {result['step_ms']:.2f} ms")
    print(f"a read of memory by two threads: {read / 1e9:.1f} GB/s")


def _arguments() -> argparse.Namespace:
    parser = benchmark_parser("Where a step's time goes.")
    parser.add_argument(
        "--requests", type=WHOLE, default=1, metavar="N", help="at once (default: 1)"
    )
    parser.add_argument(
        "--input-len", type=WHOLE, default=128, metavar="N", help="of a prompt (default: 128)"
    )
    parser.add_argument(
        "--steps", type=WHOLE, default=50, metavar="N", help="that are profiled (default: 50)"
    )
    parser.add_argument(
        "--prefill", action="store_true", help="profile the step that takes the prompts in"
    )
    parser.add_argument("--seed", type=WHOLE, default=0, metavar="N", help="(default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
