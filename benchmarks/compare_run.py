"""Runs a comparison: every engine at every point that is asked for, and what came of it."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.compare_fresh import (
    FIRST,
    ONE,
    QUALITY_FIGURES,
    START_FIGURES,
    family_of,
    measure_quality,
    measure_start,
    read_texts,
)
from benchmarks.compare_points import POINTS, THREADS, Point, room_for
from benchmarks.compare_turns import (
    Contender,
    Found,
    figures_of,
    measure_load,
    read_rate,
    take_turns,
    turn,
)
from benchmarks.options import say
from benchmarks.processes import OthersClock

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
        vocab_size: token ids that it knows.
        options: flags of ours.
        folder: where each peer has a folder of its name.
        num_rounds: of each point at most.
        seed: of the prompts.
        lock: a file that is locked while a point is measured; None locks none.
    """

    ours: str
    model: Path
    vocab_size: int
    options: Sequence[str]
    folder: Path
    num_rounds: int
    seed: int = 0
    lock: Path | None = None

    def run(self, engines: Sequence[Contender], names: Sequence[str]) -> dict[str, Any]:
        """Returns what was found of all engines at the points of these names."""
        points = [point for point in POINTS if point.name in names]
        made: dict[str, Any] = {}
        reads: list[float] = []
        with contextlib.ExitStack() as stack:
            for engine in engines:
                stack.enter_context(engine)
            if points or QUALITY in names:
                loads = [point.load for point in points] or [FIRST, ONE]
                for engine in engines:
                    engine.load(room_for(loads, *self._place(engine)))
            for point in points:
                with turn(self.lock), _Others(engines) as others:
                    found = self._measure(engines, point, reads)
                made[point.name] = self._told(point, found) | {"others_cores": others.cores}
            if QUALITY in names:
                made[QUALITY] = self._quality(engines)
        if START in names:
            made[START] = self._start(engines)
        result: dict[str, Any] = {
            "ours": self.ours,
            "threads": THREADS,
            "seed": self.seed,
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

        return measure_load(engines, point, self.num_rounds, self.vocab_size, self.seed, read)

    def _told(self, point: Point, found: Mapping[str, Found]) -> dict[str, Any]:
        return {
            "title": point.title,
            "num_requests": point.load.num_requests,
            "input_len": point.load.input_len,
            "output_len": point.load.output_len,
            "figures": figures_of(point.figures, found, self.ours),
        }

    def _quality(self, engines: Sequence[Contender]) -> dict[str, Any]:
        texts = read_texts()
        say(f"quality on {len(texts)} texts")
        found = take_turns(engines, lambda engine, _: measure_quality(engine, texts), 1)
        return {
            "title": "quality",
            "num_texts": len(texts),
            "num_places": sum(len(text.logprobs) for text in texts),
            "figures": figures_of(QUALITY_FIGURES, found, self.ours),
        }

    def _start(self, engines: Sequence[Contender]) -> dict[str, Any]:
        def start(engine: Contender) -> Mapping[str, float]:
            say(f"start: {engine.name}")
            with turn(self.lock):
                return measure_start(engine, *self._place(engine), self.vocab_size)

        def warm(engine: Contender) -> None:
            # Leaves the files and the engine's own caches warm.
            start(engine)

        found = take_turns(engines, lambda engine, _: start(engine), self.num_rounds, warm)
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


class _Others:
    """Counts the cores that others on the machine take while the `with` block runs.

    Attributes:
        cores: on average; None where an engine ended meanwhile.
    """

    def __init__(self, engines: Sequence[Contender]) -> None:
        self.cores: float | None = None
        self._engines = engines

    def __enter__(self) -> "_Others":
        pids = [engine.pid for engine in self._engines if engine.pid is not None]
        self._clock = OthersClock(*(one for pid in pids for one in family_of(pid)))
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self.cores = self._clock.cores()
