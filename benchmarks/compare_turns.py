"""Engines that take turns, A B C A B C, so that one computes at a time; what each was found to do.

An engine that fails has its reason kept in place of figures, and the others go on.
"""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks import report
from benchmarks.compare_points import Figure, Load, Point
from benchmarks.options import say
from benchmarks.peers.driver import Room
from benchmarks.peers.process import PeerError, PeerProcess, Program
from benchmarks.processes import OthersClock
from pallasite.models.errors import ConfigError

Measure = Callable[["Contender", int], Mapping[str, float]]
"""Takes figures of an engine in a round, by name. May raise PeerError or ConfigError."""


class Contender:
    """An engine that stays loaded while the `with` block runs, or the reason why it does not.

    Attributes:
        name: of the engine.
        program: what runs it; None where it is not installed.
        reason: why it cannot be asked; "" where it can.
    """

    def __init__(self, name: str, program: Program | None, reason: str = "") -> None:
        self.name = name
        self.program = program
        self.reason = reason
        self.settings: Mapping[str, Any] = {}
        self.versions: Mapping[str, str] = {}
        self._process: PeerProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    @property
    def process(self) -> PeerProcess:
        """Its process. Raises PeerError where it has none, with the reason."""
        if self._process is None:
            raise PeerError(self.reason or "it is not loaded")
        return self._process

    @property
    def pid(self) -> int | None:
        """Its process's; None where it has none."""
        return None if self._process is None else self._process.pid

    def load(self, room: Room) -> None:
        """Loads it; where that fails, keeps the reason."""
        if self.program is None:
            return
        say(f"{self.name}: loading")
        try:
            self._process = PeerProcess(self.program)
            self._process.load(room)
        except PeerError as error:
            self.reason = f"it cannot be loaded: {error}"
            say(f"{self.name}: {self.reason}")
            self.__exit__()
            return
        self.settings, self.versions = self._process.settings, self._process.versions

    def told(self) -> dict[str, Any]:
        """Returns what a result says of it."""
        return {
            "reason": self.reason,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }


@dataclass
class Found:
    """What came of one engine at one point.

    Attributes:
        runs: the figures of each round, by name.
        reason: why there are none.
        others_cores: cores that others on the machine had during each round, on average.
    """

    runs: dict[str, list[float]] = field(default_factory=dict)
    reason: str = ""
    others_cores: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How engines are measured.

    Attributes:
        num_rounds: of each point at most.
        vocab_size: token ids that prompts are made of.
        seed: of the prompts.
        lock: a file that is locked while an engine is warmed or measured; None locks none.
    """

    num_rounds: int
    vocab_size: int
    seed: int = 0
    lock: Path | None = None


def take_turns(
    contenders: Sequence[Contender],
    measure: Measure,
    terms: Terms,
    warm: Callable[[Contender], None] = lambda contender: None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Found]:
    """Returns what was found of each: all are warmed, and then each is measured once a round.

    `between` runs once a round, while no engine does.
    """
    found = {contender.name: Found() for contender in contenders}
    for contender in contenders:
        with _kept(contender, found[contender.name]), turn(terms.lock):
            warm(contender)
    for number in range(terms.num_rounds):
        with turn(terms.lock):
            between()
        for contender in contenders:
            one = found[contender.name]
            if one.reason:
                continue
            with _kept(contender, one), turn(terms.lock), _Others(contenders) as others:
                values = measure(contender, number)
            if one.reason:
                continue
            for name, value in values.items():
                one.runs.setdefault(name, []).append(value)
            if others.cores is not None:
                one.others_cores.append(others.cores)
    return found


@contextlib.contextmanager
def _kept(contender: Contender, found: Found) -> Iterator[None]:
    """Keeps the reason of a failure, and drops the figures that came before it."""
    try:
        yield
    except (PeerError, ConfigError) as error:
        found.reason = str(error)
        found.runs.clear()
        say(f"{contender.name}: {error}")


def measure_load(
    contenders: Sequence[Contender],
    point: Point,
    terms: Terms,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Found]:
    """Returns what was found of each engine at a point.

    The prompts of a round are the same for all engines and those of no other round.
    """
    load = point.load

    def prompts(one: Load, number: int) -> list[list[int]]:
        return one.prompts(terms.vocab_size, (terms.seed, number))

    def warm(contender: Contender) -> None:
        say(f"{point.name}, warming: {contender.name}")
        contender.process.prepare(load.num_requests, load.request_len)
        length = point.warm_output_len
        # Where only few tokens are made, one short request is enough.
        few = load if length is None else Load(num_requests=1, input_len=64, output_len=length)
        contender.process.generate(prompts(few, 0), few.output_len)

    def measure(contender: Contender, number: int) -> Mapping[str, float]:
        say(f"{point.name}, round {number + 1}: {contender.name}")
        tokens = contender.process.generate(prompts(load, number + 1), load.output_len)
        return point.read(load, tokens)

    if point.num_rounds is not None:
        terms = replace(terms, num_rounds=min(terms.num_rounds, point.num_rounds))
    return take_turns(contenders, measure, terms, warm, between)


def figures_of(
    figures: Sequence[Figure], found: Mapping[str, Found], ours: str
) -> dict[str, dict[str, Any]]:
    """Returns each figure with every engine's median and runs, and ours against the best peer's."""
    made = {}
    for figure in figures:
        engines: dict[str, dict[str, Any]] = {}
        for name, one in found.items():
            runs = one.runs.get(figure.name)
            if runs:
                engines[name] = report.spread(runs)
            else:
                engines[name] = {"reason": one.reason or "it has no such figure"}
        made[figure.name] = {
            "title": figure.title,
            "unit": figure.unit,
            "better": "more" if figure.is_more_better else "less",
            "definition": figure.definition,
            "engines": engines,
        } | against_best(engines, figure.is_more_better, ours)
    return made


def against_best(
    engines: Mapping[str, Mapping[str, Any]], is_more_better: bool, ours: str
) -> dict[str, Any]:
    """Returns which peer's median is the best one, and ours divided by it; None where unknown."""
    medians = {name: one["median"] for name, one in engines.items() if "median" in one}
    own = medians.pop(ours, None)
    if not medians:
        return {"best_peer": None, "ours_to_best_peer": None}
    best = (max if is_more_better else min)(medians, key=lambda name: medians[name])
    ratio = None if own is None or medians[best] == 0 else own / medians[best]
    return {"best_peer": best, "ours_to_best_peer": ratio}


@contextlib.contextmanager
def turn(path: Path | None) -> Iterator[None]:
    """Holds a lock of the machine while the `with` block runs; None holds none."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Others:
    """Counts the cores that others on the machine take while the `with` block runs.

    Attributes:
        cores: on average; None where an engine ended meanwhile.
    """

    def __init__(self, contenders: Sequence[Contender]) -> None:
        self.cores: float | None = None
        self._pids = [one.pid for one in contenders if one.pid is not None]
        self._clock: OthersClock | None = None

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            self._clock = OthersClock(*(one for pid in self._pids for one in family_of(pid)))
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self.cores = None if self._clock is None else self._clock.cores()


def family_of(pid: int) -> list[int]:
    """Returns a process and all below it. Raises OSError where it is gone or this is no Linux."""
    found = [pid]
    for one in found:
        for thread in Path(f"/proc/{one}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def read_rate(num_threads: int, num_bytes: int = 1 << 30) -> float:
    """Returns bytes a second that threads read, each its part of an array, once. Measured."""
    # NumPy lets go of the interpreter's lock while it reduces.
    parts = np.split(np.ones(num_bytes // 4 // num_threads * num_threads, np.float32), num_threads)
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(np.max, parts))
        start_s = time.perf_counter()
        list(pool.map(np.max, parts))
        return sum(part.nbytes for part in parts) / (time.perf_counter() - start_s)
