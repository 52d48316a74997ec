"""What a server holds of the host's memory while as many requests as it runs at once are in flight.

Each request grows to `--input-len + --output-len` tokens, all of them cached together.
"""

import argparse
import asyncio
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.options import (
    Workload,
    benchmark_parser,
    engine_config,
    run,
    say,
    vocab_size,
)
from benchmarks.processes import Memory, ServerProcess, memory_of
from benchmarks.serving import Load
from pallasite.engine.config import EngineConfig
from pallasite.models.errors import ConfigError
from pallasite.server.client import AsyncClient
from pallasite.server.flags import WHOLE

GOAL_BYTES = 1.5e9
INTERVAL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A server's memory at a moment, and how many requests ran then."""

    num_running: int
    memory: Memory


def main() -> None:
    """Measures and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    config = engine_config(args)
    workload = Workload(
        num_prompts=config.max_requests, input_len=args.input_len, output_len=args.output_len
    )
    result: dict[str, Any] = {
        "model_id": args.model,
        "weights": config.weights,
        "num_requests": workload.num_prompts,
        "tokens_per_request": workload.input_len + workload.output_len,
    }
    with tempfile.TemporaryDirectory(prefix="pallasite-") as folder:
        # A cold start compiles, so it is its own case.
        cached = replace(config, compile_cache=Path(folder))
        for name in ("cold", "warm"):
            say(f"a server with a {name} compile cache")
            result[name] = asyncio.run(_measure(args.model, cached, workload))
    _show(result)
    if args.output is not None:
        report.write_json(args.output, result)


async def _measure(model: str, config: EngineConfig, workload: Workload) -> dict[str, Any]:
    """Returns the memory of a server that was just started, and the most under load."""
    requests = workload.requests(vocab_size(model))
    with ServerProcess(model, config) as server:
        idle = memory_of(server.pid)
        load = Load(concurrency=len(requests), arrivals_s=workload.arrivals_s())
        sending = asyncio.create_task(load.send(server.address, requests))
        samples = await _sample(server, sending)
        records, _ = await sending
    if errors := [record.error for record in records if record.error]:
        raise ConfigError(
            f"got {len(errors)} failed requests, the first with {errors[0]!r}; all must be in"
            " flight together; give the server room for them"
        )
    return figures(idle, samples, len(requests))


async def _sample(server: ServerProcess, sending: "asyncio.Task[Any]") -> list[Sample]:
    samples = []
    async with AsyncClient(server.address) as client:
        while not sending.done():
            load = await client.load()
            samples.append(Sample(num_running=load.num_running, memory=memory_of(server.pid)))
            await asyncio.sleep(INTERVAL_S)
    return samples


def figures(idle: Memory, samples: list[Sample], num_requests: int) -> dict[str, Any]:
    """Returns bytes: idle, and the sample with the most resident of those with all running.

    Raises ConfigError where all never ran together.
    """
    full = [sample.memory for sample in samples if sample.num_running == num_requests]
    if not full:
        most = max((sample.num_running for sample in samples), default=0)
        raise ConfigError(
            f"got {most} requests at once; all {num_requests} must run together; raise"
            " --cache-tokens, or lower --input-len or --output-len"
        )
    loaded = max(full, key=lambda memory: memory.resident)
    return {"idle": asdict(idle), "loaded": asdict(loaded), "num_samples": len(full)}


def _show(result: dict[str, Any]) -> None:
    names = {
        "resident": "resident (VmRSS)",
        "anonymous": "of it backed by no file",
        "proportional": "proportional (PSS)",
        "peak_resident": "most ever resident (VmHWM)",
    }
    columns = [(cache, state) for cache in ("cold", "warm") for state in ("idle", "loaded")]
    rows = [
        [title, *(result[cache][state][name] / 1e9 for cache, state in columns)]
        for name, title in names.items()
    ]
    title = f"GB, {result['num_requests']} requests of {result['tokens_per_request']} tokens"
    print(report.table(title, ["", *(f"{c}, {s}" for c, s in columns)], rows))
    resident = result["warm"]["loaded"]["resident"] / 1e9
    print(f"\nresident under load, warm: {resident:.2f} GB (goal: <= {GOAL_BYTES / 1e9:g} GB)")


def _arguments() -> argparse.Namespace:
    parser = benchmark_parser("Memory of a server with --max-requests requests in flight.")
    for name, default, what in (
        ("--input-len", 928, "tokens of each prompt"),
        ("--output-len", 96, "tokens of each completion"),
    ):
        help_text = f"{what} (default: {default})"
        parser.add_argument(name, type=WHOLE, default=default, metavar="N", help=help_text)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
