"""Runs a comparison: every engine at every point that is asked for, and what came of it."""

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.compare_fresh import (
    QUALITY_FIGURES,
    SCORED,
    START_FIGURES,
    measure_quality,
    measure_start,
    read_texts,
)
from benchmarks.compare_points import POINTS, THREADS, Point, room_for
from benchmarks.compare_turns import (
    Contender,
    Found,
    Terms,
    figures_of,
    measure_load,
    read_rate,
    take_turns,
)
from benchmarks.options import say

START, QUALITY = "start", "quality"
POINT_NAMES = (*(point.name for point in POINTS), START, QUALITY)

BANDWIDTH = (
    "bytes of all weights x decode tokens/s of decode-1 / bytes a second that two threads of NumPy"
    " read of an array of 1 GiB, once a round in the same run"
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        ours: which engine the others are compared with.
        model: the GGUF file.
        options: flags of ours.
        folder: where each peer has a folder of its name.
        terms: how.
    """

    ours: str
    model: Path
    options: Sequence[str]
    folder: Path
    terms: Terms

    def run(self, engines: Sequence[Contender], names: Sequence[str]) -> dict[str, Any]:
        """Returns what was found of all engines at the points of these names."""
        points = [point for point in POINTS if point.name in names]
        made: dict[str, Any] = {}
        reads: list[float] = []
        with contextlib.ExitStack() as stack:
            for engine in engines:
                stack.enter_context(engine)
            if points or QUALITY in names:
                loads = [point.load for point in points]
                loads += [SCORED] if QUALITY in names else []
                for engine in engines:
                    engine.load(room_for(loads, *self._place(engine)))
            for point in points:
                made[point.name] = self._told(point, self._measure(engines, point, reads))
            if QUALITY in names:
                made[QUALITY] = self._quality(engines)
        if START in names:
            made[START] = self._start(engines)
        result: dict[str, Any] = {
            "ours": self.ours,
            "threads": THREADS,
            "seed": self.terms.seed,
            "engines": {engine.name: engine.told() for engine in engines},
            "points": made,
        }
        if reads:
            result |= self._bandwidth(result, reads)
        return result

    def _place(self, engine: Contender) -> tuple[str, str, Sequence[str]]:
        folder = str(self.folder / engine.name)
        return str(self.model), folder, self.options if engine.name == self.ours else ()

    def _measure(
        self, engines: Sequence[Contender], point: Point, reads: list[float]
    ) -> dict[str, Found]:
        def read() -> None:
            if point.name == "decode-1":
                reads.append(read_rate(THREADS))

        return measure_load(engines, point, self.terms, read)

    def _told(self, point: Point, found: Mapping[str, Found]) -> dict[str, Any]:
        return {
            "title": point.title,
            "num_requests": point.load.num_requests,
            "input_len": point.load.input_len,
            "output_len": point.load.output_len,
            "others_cores": _others(found),
            "figures": figures_of(point.figures, found, self.ours),
        }

    def _quality(self, engines: Sequence[Contender]) -> dict[str, Any]:
        texts = read_texts()
        say(f"quality on {len(texts)} texts")
        found = take_turns(
            engines,
            lambda engine, _: measure_quality(engine, texts),
            replace(self.terms, num_rounds=1, lock=None),
        )
        return {
            "title": "quality",
            "num_texts": len(texts),
            "num_places": sum(len(text.logprobs) for text in texts),
            "figures": figures_of(QUALITY_FIGURES, found, self.ours),
        }

    def _start(self, engines: Sequence[Contender]) -> dict[str, Any]:
        def start(engine: Contender) -> Mapping[str, float]:
            say(f"start: {engine.name}")
            return measure_start(engine, *self._place(engine), self.terms.vocab_size)

        def warm(engine: Contender) -> None:
            # Leaves the files and the engine's own caches warm.
            start(engine)

        found = take_turns(engines, lambda engine, _: start(engine), self.terms, warm)
        return {"title": "start", "figures": figures_of(START_FIGURES, found, self.ours)}

    def _bandwidth(self, result: Mapping[str, Any], reads: Sequence[float]) -> dict[str, Any]:
        """Returns the share of the memory's bandwidth that our weights take; {} if unknown."""
        rate = result["points"]["decode-1"]["figures"]["decode"]["engines"].get(self.ours, {})
        weights = result["engines"].get(self.ours, {}).get("settings", {}).get("weight_bytes")
        if "median" not in rate or weights is None:
            return {}
        read = report.spread(reads)
        return {
            "bandwidth": {
                "definition": BANDWIDTH,
                "read": read,
                "weight_bytes": weights,
                "share": weights * rate["median"] / read["median"],
            }
        }


def _others(found: Mapping[str, Found]) -> float | None:
    """Returns the median over all runs of the cores that others had; None where not counted."""
    cores = [each for one in found.values() for each in one.others_cores]
    return statistics.median(cores) if cores else None
