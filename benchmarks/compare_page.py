"""What is made of a comparison: tables for a terminal and for a page, and a picture.

It reads nothing but the result as it stands in JSON.
"""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.compare_result import Result
from benchmarks.kernel_page import Table
from benchmarks.report import shown

NAMES = (
    "compare run",
    "compare figures",
    "compare reasons",
    "compare definitions",
    "compare engines",
)
"""Of the tables of a page."""


def tables(result: Result) -> list[Table]:
    """Returns the tables of NAMES."""
    rows = tuple(reasons(result)) or (("-", "-", "every engine has every figure"),)
    return [
        _run(result),
        _figures(result),
        Table(
            name="compare reasons",
            title="places without a figure",
            headers=("engine", "points", "reason"),
            rows=rows,
        ),
        _definitions(result),
        _engines(result),
    ]


def reasons(result: Result) -> list[tuple[str, str, str]]:
    """Returns (engine, points, reason) of every place without a figure."""
    points: dict[tuple[str, str], list[str]] = {}
    for point, _, figure in _each_figure(result):
        for engine in result["engines"]:
            one = figure["engines"].get(engine, {"reason": "not asked in that point's run"})
            if "reason" in one:
                named = points.setdefault((engine, one["reason"]), [])
                if point not in named:
                    named.append(point)
    return [(engine, ", ".join(named), reason) for (engine, reason), named in points.items()]


def draw(path: Path, result: Result) -> None:
    """Draws the medians, as a PNG, a panel for each figure. Needs matplotlib."""
    from matplotlib.figure import Figure

    panels = [figure for _, _, figure in _each_figure(result) if _medians(figure)]
    names = list(result["engines"])
    num_columns = 2
    num_lines = -(-len(panels) // num_columns)
    drawing = Figure(figsize=(10, 0.5 + 0.22 * num_lines * (len(names) + 3)), layout="constrained")
    axes = drawing.subplots(max(1, num_lines), num_columns, squeeze=False).ravel()
    for axis, figure in zip(axes, panels, strict=False):
        medians = _medians(figure)
        engines = [name for name in names if name in medians]
        colours = ["C0" if name == result["ours"] else "C7" for name in engines]
        values = [medians[name] for name in engines]
        drawn = axis.barh(range(len(engines)), values, color=colours)
        axis.set_yticks(range(len(engines)), engines)
        axis.bar_label(drawn, [shown(value) for value in values], fontsize=7, padding=2)
        unit = f", {figure['unit']}" if figure["unit"] else ""
        axis.set_title(f"{figure['title']}{unit} ({figure['better']} is better)", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.15)
        axis.invert_yaxis()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    drawing.savefig(path, format="png", dpi=110)


def _each_figure(result: Result) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yields each figure with its point."""
    for name, point in result["points"].items():
        for figure in point["figures"].values():
            yield name, point, figure


def _medians(figure: Mapping[str, Any]) -> dict[str, float]:
    return {name: one["median"] for name, one in figure["engines"].items() if "median" in one}


def _figures(result: Result) -> Table:
    engines = list(result["engines"])
    rows = []
    for _, _, figure in _each_figure(result):
        medians = _medians(figure)
        ratio = figure["ours_to_best_peer"]
        rows.append(
            (
                figure["title"],
                figure["unit"],
                figure["better"],
                *(medians.get(name) for name in engines),
                figure["best_peer"],
                ratio,
            )
        )
    if (bandwidth := result.get("bandwidth")) is not None:
        blank = [100 * bandwidth["share"] if name == result["ours"] else None for name in engines]
        rows.append(("weights' share of memory bandwidth", "%", "more", *blank, None, None))
    return Table(
        name="compare figures",
        title="medians; '-' has its reason below",
        headers=("figure", "unit", "better", *engines, "best peer", "ours / best peer"),
        rows=tuple(rows),
    )


def _definitions(result: Result) -> Table:
    rows = [
        (figure["title"], figure["definition"], len(_longest_runs(figure)))
        for _, _, figure in _each_figure(result)
    ]
    if (bandwidth := result.get("bandwidth")) is not None:
        text = bandwidth["definition"]
        rows.append(("weights' share of memory bandwidth", text, len(bandwidth["read"]["runs"])))
    return Table(
        name="compare definitions",
        title="definitions",
        headers=("figure", "definition", "runs"),
        rows=tuple(rows),
    )


def _longest_runs(figure: Mapping[str, Any]) -> list[float]:
    return max((one.get("runs", []) for one in figure["engines"].values()), key=len, default=[])


def _engines(result: Result) -> Table:
    rows = []
    for name, engine in result["engines"].items():
        versions = ", ".join(f"{what} {version}" for what, version in engine["versions"].items())
        settings = "; ".join(f"{what}: {_plain(x)}" for what, x in engine["settings"].items())
        rows.append((name, versions or "-", settings or engine["reason"] or "-"))
    return Table(
        name="compare engines",
        title="engines",
        headers=("engine", "versions", "settings"),
        rows=tuple(rows),
    )


def _plain(setting: Any) -> str:
    """A setting in a cell of a table, on one line."""
    if isinstance(setting, Mapping):
        return ", ".join(f"{name} {_plain(value)}" for name, value in setting.items())
    if isinstance(setting, list):
        return " ".join(map(_plain, setting)) or "none"
    return " ".join(str(setting).replace("|", ",").split())


def _others(result: Result) -> str:
    points = result["points"].items()
    cores = [f"{name} {x:.2f}" for name, p in points if (x := p.get("others_cores")) is not None]
    return ", ".join(cores) or "not counted"


def _without_folders(command: str) -> str:
    """A command with the names of its files alone."""
    words = shlex.split(command)
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)


def _run(result: Result) -> Table:
    machine = result["machine"]
    runs: dict[tuple[str, str], list[str]] = {}
    for name, point in result["points"].items():
        runs.setdefault((point["command"], point["date"]), []).append(name)
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
        ("model", result["model_id"]),
        ("threads of each engine", str(result["threads"])),
        ("cores that others had meanwhile, by point", _others(result)),
    )
    return Table(name="compare run", title="the run", headers=("what", "how"), rows=what)
