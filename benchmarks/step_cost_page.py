"""What is made of the cost of steps: tables for a terminal and for a page, and a picture.

It reads nothing but the result as it stands in JSON.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.kernel_page import Table

NAMES = ("step cost run", "step cost lines", "step cost points")
"""Of the tables of a page."""

Result = Mapping[str, Any]


def tables(result: Result) -> list[Table]:
    """Returns the tables of NAMES."""
    return [_run(result), _lines(result), _points(result)]


def draw(path: Path, result: Result) -> None:
    """Draws each series, its line and the machine's, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 7), layout="constrained")
    axes = drawing.subplots(2, 2, squeeze=False).ravel()
    for axis, one in zip(axes, result["series"].values(), strict=False):
        sizes = [point["size"] for point in one["points"]]
        medians = [1e3 * point["seconds"]["median"] for point in one["points"]]
        ends = [0.0, max(sizes)]
        axis.plot(sizes, medians, "o", color="C0", label="measured, median")
        for name, colour in (("line", "C0"), ("roofline", "C7")):
            line = one[name]
            values = [1e3 * (line["start"] + line["slope"] * end) for end in ends]
            title = "line of least squares" if name == "line" else "the machine's own speeds"
            axis.plot(ends, values, "-", color=colour, linewidth=1, label=title)
        axis.set(title=_title(one), xlabel=_grows(one), ylabel="ms a step", xlim=0, ylim=0)
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes[len(result["series"]) :]:
        axis.set_axis_off()
    drawing.savefig(path, format="png", dpi=110)


def _title(series: Mapping[str, Any]) -> str:
    num_requests = series["num_requests"]
    requests = "1 request" if num_requests == 1 else f"{num_requests} requests"
    return {
        "rows": "decode at a short context, by rows",
        "prompt": "a prompt in one step, by its tokens",
        "cached": f"decode of {requests}, by cached tokens",
    }[series["kind"]]


def _grows(series: Mapping[str, Any]) -> str:
    return {
        "rows": "row",
        "prompt": "token",
        "cached": "cached token",
    }[series["kind"]] + ("s of all requests" if series["num_requests"] > 1 else "s")


def _lines(result: Result) -> Table:
    rows = tuple(
        (
            _title(one),
            1e3 * one["line"]["start"],
            1e3 * one["roofline"]["start"],
            1e6 * one["line"]["slope"],
            1e6 * one["roofline"]["slope"],
            one["slope_to_roofline"],
            round(one["line"]["r_squared"], 4),
            100 * one["line"]["largest_miss"],
        )
        for one in result["series"].values()
    )
    return Table(
        name="step cost lines",
        title="lines through the steps' times, beside those of the machine's own speeds",
        headers=(
            "series",
            "starts at, ms",
            "machine, ms",
            "rises by, us",
            "machine, us",
            "ratio",
            "R²",
            "largest miss, %",
        ),
        rows=rows,
    )


def _points(result: Result) -> Table:
    rows = []
    for one in result["series"].values():
        line = one["line"]
        for point in one["points"]:
            median = point["seconds"]["median"]
            fitted = line["start"] + line["slope"] * point["size"]
            rows.append(
                (
                    _title(one),
                    round(point["size"]),
                    point["program"],
                    1e3 * median,
                    1e3 * fitted,
                    f"{100 * (median - fitted) / median:+.1f}",
                    len(point["seconds"]["runs"]),
                )
            )
    return Table(
        name="step cost points",
        title="steps",
        headers=("series", "size", "program", "ms", "line, ms", "off the line, %", "steps"),
        rows=tuple(rows),
    )


def _run(result: Result) -> Table:
    machine = result["machine"]
    runs: dict[tuple[str, str], list[str]] = {}
    for name, one in result["series"].items():
        runs.setdefault((one["command"], one["date"]), []).append(name)
    speeds = [
        (
            f"the machine, around {name}",
            f"reads {one['speeds']['read'] / 1e9:.1f} GB/s,"
            f" {one['speeds']['operations'] / 1e9:,.0f} billion operations/s",
        )
        for name, one in result["series"].items()
    ]
    work = next(iter(result["series"].values()))["work"]
    what = (
        *(
            (", ".join(names), f"`{_without_folders(command)}`, {date}")
            for (command, date), names in runs.items()
        ),
        (
            "machine",
            f"{machine['cores']} cores, {machine['architecture']}, {machine['vectors']},"
            f" {machine['memory_bytes'] / 1e9:.0f} GB",
        ),
        *speeds,
        (
            result["model_id"],
            f"{work['weight_bytes'] / 1e6:.1f} MB of weights;"
            f" {work['row_operations'] / 1e6:.1f} million operations a row, and"
            f" {work['head_operations'] / 1e6:.1f} for its logits;"
            f" {work['cached_bytes']:,} bytes a cached token",
        ),
    )
    return Table(name="step cost run", title="the run", headers=("what", "how"), rows=what)


def _without_folders(command: str) -> str:
    """A command with the names of its files alone."""
    words = shlex.split(command)
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)
