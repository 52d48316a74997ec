"""What a benchmark says: figures from what clients saw, as JSON, as a table and as a picture.

The names and definitions are those of the result file that `vllm bench serve` writes, so that its
tools read ours. Knows neither an engine nor a server.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pallasite.models.errors import ConfigError

PERCENTILES = (50, 90, 99)
METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "gap between two events",
    "e2el": "whole request",
}


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request as its client saw it, in seconds of one clock.

    Attributes:
        start_s, end_s: when it was sent, and when its last event was there.
        events: when tokens came, and how many at once.
        error: what it failed with; "" where it completed.
    """

    start_s: float
    end_s: float
    num_prompt_tokens: int
    events: tuple[tuple[float, int], ...] = ()
    error: str = ""

    @property
    def num_output_tokens(self) -> int:
        return sum(count for _, count in self.events)

    @property
    def latency_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def ttft_s(self) -> float:
        """From sending to the first token; the whole time where none came."""
        return (self.events[0][0] if self.events else self.end_s) - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """A token's share of the time after the first; None where there is no second."""
        if self.num_output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Gaps between one event and the next."""
        times = [time_s for time_s, _ in self.events]
        return tuple(after - before for before, after in pairwise(times))


def serving_result(
    records: Sequence[RequestRecord], duration_s: float, goodput: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the figures of one run of `duration_s` seconds.

    `goodput` holds the most milliseconds that a good request takes, by metric (ttft, tpot, e2el);
    empty asks for no goodput. Times are of completed requests alone, in milliseconds, and null
    where there are none; throughputs are a second's.
    """
    completed = [record for record in records if not record.error]
    num_input = sum(record.num_prompt_tokens for record in completed)
    num_output = sum(record.num_output_tokens for record in completed)
    good = sum(_is_good(record, goodput) for record in completed)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(records) - len(completed),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(completed) / duration_s,
        "request_goodput": good / duration_s if goodput else None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": _busiest_second(completed),
        "max_concurrent_requests": _peak_concurrency(completed),
    }
    tpots = [record.tpot_s for record in completed]
    result |= summary("ttft", [record.ttft_s for record in completed])
    result |= summary("tpot", [tpot for tpot in tpots if tpot is not None])
    result |= summary("itl", [gap for record in completed for gap in record.itl_s])
    result |= summary("e2el", [record.latency_s for record in completed])
    result |= {
        "input_lens": [record.num_prompt_tokens for record in records],
        "output_lens": [record.num_output_tokens for record in records],
        "ttfts": [record.ttft_s for record in records],
        "itls": [list(record.itl_s) for record in records],
        "errors": [record.error for record in records],
    }
    return result


def summary(metric: str, values_s: Sequence[float]) -> dict[str, float | None]:
    """Returns mean, median, standard deviation and PERCENTILES of seconds, in milliseconds.

    Percentiles are interpolated linearly; all are None where there is no value.
    """
    values = 1000.0 * np.asarray(values_s, np.float64)
    names = [f"{kind}_{metric}_ms" for kind in ("mean", "median", "std")]
    names += [f"p{percent}_{metric}_ms" for percent in PERCENTILES]
    if not values.size:
        return dict.fromkeys(names)
    figures = [values.mean(), np.median(values), values.std(), *np.percentile(values, PERCENTILES)]
    return {name: float(figure) for name, figure in zip(names, figures, strict=True)}


def parse_goodput(items: Iterable[str]) -> dict[str, float]:
    """Reads limits such as `ttft:200`, in milliseconds. Raises ConfigError for another form."""
    limits: dict[str, float] = {}
    for item in items:
        metric, _, text = item.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if metric not in ("ttft", "tpot", "e2el") or not limit > 0 or metric in limits:
            raise ConfigError(
                f"got --goodput {item!r}; allowed is METRIC:MILLISECONDS with a METRIC of ttft,"
                " tpot or e2el, each once, and a number > 0; write for instance ttft:200 tpot:50"
            )
        limits[metric] = limit
    return limits


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns the median of the runs' figures, and all of them."""
    return {"median": float(np.median(values)), "runs": list(values)}


def provenance() -> dict[str, Any]:
    """Returns how the figures were made: by a clock here, on what, by which command, when."""
    return {
        "made": "measured",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": f"python -m {_module_name()} {shlex.join(sys.argv[1:])}".rstrip(),
        "machine": machine(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("pallasite", "jax", "jaxlib")
        },
    }


def machine() -> dict[str, Any]:
    """Returns the kind of machine: architecture, cores, memory, widest vectors."""
    cpus = Path("/proc/cpuinfo")
    flags = set(cpus.read_text().split()) if cpus.exists() else set()
    widest = next((name for name in ("avx512f", "avx2", "asimd") if name in flags), "unknown")
    return {
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "vectors": {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}.get(widest, widest),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result with its provenance; a value that is no number is an error, not `NaN`."""
    text = json.dumps(provenance() | dict(result), indent=2, allow_nan=False)
    path.write_text(text + "\n")


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table as text: the first column to the left, the others to the right."""
    cells = [[shown(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        parts = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, line(headers), rule, *map(line, cells)])


def shown(value: Any) -> str:
    """Returns a value for people: three digits of a small number, none after the point of a big."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{digits}f}"


def latency_rows(result: Mapping[str, Any]) -> list[list[Any]]:
    """Returns a table's rows of a result's times: metric, mean, std, then PERCENTILES."""
    kinds = ["mean", "std", *(f"p{percent}" for percent in PERCENTILES)]
    return [
        [f"{name} ({text}), ms", *(result[f"{kind}_{name}_ms"] for kind in kinds)]
        for name, text in METRICS.items()
    ]


def check_plot() -> None:
    """Raises ConfigError where no picture can be drawn; call it before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "got --plot, which needs matplotlib; it is not installed here; run"
            " `pip install matplotlib`, or leave --plot out"
        )


def write_plot(path: Path, title: str, series: Mapping[str, Sequence[float]], unit: str) -> None:
    """Draws, as a PNG, which share of each series' values is at most x. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in series.items():
        x, share = cumulative(values)
        axes.step(x, share, where="post", label=name)
    axes.set(title=title, xlabel=unit, ylabel="share of values", xscale="log", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)


def cumulative(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted values and, of each, the share of values that are not above it."""
    x = np.sort(np.asarray(values, np.float64))
    return x, np.arange(1, x.size + 1) / x.size


def _is_good(record: RequestRecord, goodput: Mapping[str, float]) -> bool:
    # A request with a single token has no TPOT, and so cannot miss it.
    times_s = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2el": record.latency_s}
    return all(1000.0 * times_s[metric] <= limit for metric, limit in goodput.items())


def _busiest_second(records: Sequence[RequestRecord]) -> float:
    """Returns the most tokens that came in one second of those since the first request."""
    events = [event for record in records for event in record.events]
    if not events:
        return 0.0
    start = min(record.start_s for record in records)
    seconds = [int(time_s - start) for time_s, _ in events]
    return float(np.bincount(seconds, weights=[count for _, count in events]).max())


def _peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """Returns the most requests that were open at once; one that ends as another begins is not."""
    changes = [(record.end_s, -1) for record in records]
    changes += [(record.start_s, 1) for record in records]
    return max(accumulate(change for _, change in sorted(changes)), default=0)


def _module_name() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"
