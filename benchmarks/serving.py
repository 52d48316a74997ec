"""Serving over gRPC against the same engine offline, in turns: how much does the server cost?

Starts `pallasite serve` and an engine without a server, each in a process of its own, and runs the
same requests on both, A B A B, one at a time. Prints what `vllm bench serve` prints, and the share
of the offline throughput that the server carries.
"""

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import grpc
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
    vocab_size,
)
from benchmarks.processes import (
    EngineProcess,
    OthersClock,
    ServerProcess,
    cpu_seconds_of,
)
from pallasite.engine.request import Request
from pallasite.models.errors import ConfigError
from pallasite.proto import inference_pb2 as pb
from pallasite.server.client import AsyncClient, RetryPolicy
from pallasite.server.flags import FILE, REAL, WHOLE, Flag, add_flags, read_flags

GOAL = 0.95
"""The share of the offline throughput that 32 streams should carry."""

_FLAGS = (
    Flag(field="num_prompts", kind=WHOLE, help="requests of one run"),
    *WORKLOAD_FLAGS,
    Flag(field="request_rate", kind=REAL, help="requests a second, at random times; inf: at once"),
)


def main() -> None:
    """Measures and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    goodput = report.parse_goodput(args.goodput)
    workload = read_flags(args, Workload, _FLAGS)
    config = engine_config(args)
    if args.concurrency < 1 or args.rounds < 1:
        raise ConfigError("got less than 1 for --concurrency or --rounds; allowed is 1 or more")
    if args.plot is not None:
        report.check_plot()
    requests = workload.requests(vocab_size(args.model))
    with (
        EngineProcess(args.model, config) as offline,
        ServerProcess(args.model, config) as server,
    ):
        load = Load(concurrency=args.concurrency, arrivals_s=workload.arrivals_s())
        say("warming up both")
        few = replace(workload, num_prompts=min(args.concurrency, workload.num_prompts))
        asyncio.run(load.send(server.address, requests[: few.num_prompts]))
        offline.generate(few)
        served: list[dict[str, Any]] = []
        alone: list[float] = []
        costs: list[dict[str, float]] = []
        for number in range(1, args.rounds + 1):
            with Cost(server, offline) as served_cost:
                records, duration_s = asyncio.run(load.send(server.address, requests))
            with Cost(offline, server) as offline_cost:
                alone.append(offline.generate(workload).output_throughput)
            served.append(report.serving_result(records, duration_s, goodput))
            costs.append(
                {
                    "served_cpu_s": served_cost.cpu_s,
                    "client_cpu_s": served_cost.own_cpu_s,
                    "served_others_cores": served_cost.others_cores,
                    "offline_cpu_s": offline_cost.cpu_s,
                    "offline_others_cores": offline_cost.others_cores,
                }
            )
            say(
                f"round {number} of {args.rounds}:"
                f" served {served[-1]['output_throughput']:.1f} tokens/s,"
                f" offline {alone[-1]:.1f} tokens/s"
            )
    result = comparison(served, alone) | {
        "backend": "pallasite-grpc",
        "model_id": args.model,
        "num_prompts": workload.num_prompts,
        "request_rate": workload.request_rate if math.isfinite(workload.request_rate) else "inf",
        "max_concurrency": args.concurrency,
    }
    result |= {name: report.spread([each[name] for each in costs]) for name in costs[0]}
    _show(result)
    if args.output is not None:
        report.write_json(args.output, result)
    if args.plot is not None:
        gaps = [1000 * gap for gaps in result["itls"] for gap in gaps]
        series = {"TTFT": [1000 * ttft for ttft in result["ttfts"]], "ITL": gaps}
        report.write_plot(args.plot, f"{args.model}, {args.concurrency} streams", series, "ms")


class Cost:
    """What a `with` block took of the machine, and what others did meanwhile.

    Attributes:
        cpu_s: CPU seconds of the process that ran.
        own_cpu_s: those of this process, where the client is.
        others_cores: cores that none of the benchmark's own processes had, on average.
    """

    def __init__(
        self, runs: ServerProcess | EngineProcess, waits: ServerProcess | EngineProcess
    ) -> None:
        self.cpu_s = self.own_cpu_s = 0.0
        self.others_cores = 0.0
        self._runs, self._waits = runs, waits

    def __enter__(self) -> Self:
        self._cpu_s = cpu_seconds_of(self._runs.pid)
        self._own_cpu_s = time.process_time()
        self._others = OthersClock(self._runs.pid, self._waits.pid)
        return self

    def __exit__(self, *error: object) -> None:
        self.own_cpu_s = time.process_time() - self._own_cpu_s
        self.cpu_s = cpu_seconds_of(self._runs.pid) - self._cpu_s
        self.others_cores = self._others.cores()


class Load:
    """Sends requests over one connection, as they arrive, some number of them at once."""

    def __init__(self, *, concurrency: int, arrivals_s: np.ndarray) -> None:
        self._concurrency = concurrency
        self._arrivals_s = arrivals_s

    async def send(
        self, address: str, requests: Sequence[Request]
    ) -> tuple[list[report.RequestRecord], float]:
        """Returns a record of each request, and the seconds from the start to the last end.

        A request that waits for its turn among `concurrency` is sent, and timed, when that comes.
        """
        turn = asyncio.Semaphore(self._concurrency)
        # Nothing is tried again: a refusal is a failure, and is counted.
        async with AsyncClient(address, policy=RetryPolicy(max_attempts=1)) as client:
            await client.server_info()
            start_s = time.perf_counter()

            async def one(request: Request, arrival_s: float) -> report.RequestRecord:
                await asyncio.sleep(start_s + arrival_s - time.perf_counter())
                async with turn:
                    return await _record(client, request)

            arrivals_s = self._arrivals_s[: len(requests)].tolist()
            calls = map(one, requests, arrivals_s)
            records = await asyncio.gather(*calls)
            return list(records), time.perf_counter() - start_s


async def _record(client: AsyncClient, request: Request) -> report.RequestRecord:
    params = request.params
    sampling = pb.SamplingParams(
        max_tokens=params.max_tokens, temperature=params.temperature, ignore_eos=params.ignore_eos
    )
    events: list[tuple[float, int]] = []
    error = ""
    start_s = time.perf_counter()
    try:
        async for event in client.generate(request.prompt_ids, sampling):
            if event.token_ids:
                events.append((time.perf_counter(), len(event.token_ids)))
    except grpc.RpcError as failure:
        error = f"{failure.code().name}: {failure.details()}"
    return report.RequestRecord(
        start_s=start_s,
        end_s=time.perf_counter(),
        num_prompt_tokens=len(request.prompt_ids),
        events=tuple(events),
        error=error,
    )


def comparison(served: Sequence[dict[str, Any]], alone: Sequence[float]) -> dict[str, Any]:
    """Returns the served run of median throughput, with both throughputs' medians and their ratio.

    Of an even number of runs it is the slower of the two in the middle. Raises ConfigError where a
    request failed: what then remains is another load.
    """
    errors = sorted({error for result in served for error in result["errors"] if error})
    if errors:
        raise ConfigError(
            f"got {sum(result['failed'] for result in served)} failed requests, the first with"
            f" {errors[0]!r}; all must complete; mend that or send fewer at once"
        )
    ordered = sorted(served, key=lambda result: result["output_throughput"])
    throughputs = report.spread([result["output_throughput"] for result in served])
    offline = report.spread(alone)
    return ordered[(len(ordered) - 1) // 2] | {
        "served_output_throughput": throughputs,
        "offline_output_throughput": offline,
        "served_to_offline": throughputs["median"] / offline["median"],
    }


def _show(result: dict[str, Any]) -> None:
    headers = ["", "mean", "std", *(f"p{percent}" for percent in report.PERCENTILES)]
    title = f"{result['completed']} requests over {result['max_concurrency']} streams"
    print(report.table(title, headers, report.latency_rows(result)))
    names = ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput")
    print(report.table("\na second", ["", "value"], [[name, result[name]] for name in names]))
    runs = [f"run {number}" for number in range(1, 1 + len(result["offline_cpu_s"]["runs"]))]
    for what, title in (
        ("output_throughput", "output tokens/s, in turns"),
        ("cpu_s", "CPU seconds of the processes: the server, its client, the engine alone"),
        ("others_cores", "cores that others on the machine had meanwhile"),
    ):
        names = ("served", "client", "offline") if what == "cpu_s" else ("served", "offline")
        figures = {name: result[f"{name}_{what}"] for name in names}
        rows = [[name, each["median"], *each["runs"]] for name, each in figures.items()]
        print(report.table(f"\n{title}", ["", "median", *runs], rows))
    ratio = result["served_to_offline"]
    print(f"\nserved / offline: {ratio:.3f} (goal: >= {GOAL:.2f})")


def _arguments() -> argparse.Namespace:
    parser = benchmark_parser("Throughput and latency over gRPC, beside the same engine offline.")
    add_flags(parser, "load", Workload, _FLAGS)
    parser.add_argument(
        "--concurrency", type=WHOLE, default=32, metavar="N", help="streams at once (default: 32)"
    )
    parser.add_argument(
        "--rounds", type=WHOLE, default=5, metavar="N", help="runs of each (default: 5)"
    )
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="count requests within these times of ttft, tpot or e2el (default: count none)",
    )
    parser.add_argument(
        "--plot", type=FILE, metavar="FILE", help="draw the times as a PNG (default: do not)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
