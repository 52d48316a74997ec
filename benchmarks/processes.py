"""The processes that are measured: `pallasite serve` as an operator starts it, and an engine alone.

Also what a process holds of the machine's memory, as Linux counts it.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sysconfig
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

from benchmarks.options import Workload, say
from pallasite.engine.config import EngineConfig
from pallasite.engine.engine import Engine
from pallasite.engine.request import Request
from pallasite.models.errors import ConfigError
from pallasite.server.arguments import engine_line

START_S = 600.0
STOP_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Said:
    """A line that a server said, and when, in seconds after its process began."""

    after_s: float
    text: str


class ServerProcess:
    """`pallasite serve` on a free port, while the `with` block runs.

    Entering waits until it has named its address. Raises ConfigError where it never does.

    Attributes:
        started_s: when the process began, on the monotonic clock.
        said: what it has said so far.
    """

    def __init__(self, model: str, config: EngineConfig) -> None:
        pallasite = Path(sysconfig.get_path("scripts"), "pallasite")
        self.said: list[Said] = []
        self._address = ""
        self._has_address = threading.Event()
        self.started_s = time.monotonic()
        self._process = subprocess.Popen(
            [pallasite, "serve", model, "--port", "0", *engine_line(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self._address

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        self._has_address.wait(START_S)
        if not self._address:
            self.__exit__()
            last = self.said[-1].text if self.said else "nothing"
            raise ConfigError(
                f"got no address from `pallasite serve`, which last said {last!r}; it must start"
                f" within {START_S:g} s; mend that and try again"
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = re.sub(r"^\[ *[0-9.]+ s\] ", "", line.rstrip())
            self.said.append(Said(after_s=time.monotonic() - self.started_s, text=text))
            say(f"server: {text}")
            if match := re.search(r" is served on (\S+)$", text):
                self._address = self._address or match[1]
                self._has_address.set()
        self._has_address.set()


@dataclass(frozen=True, kw_only=True)
class OfflineRun:
    """What an engine alone did: output tokens, and the seconds of `Engine.generate`."""

    num_output_tokens: int
    duration_s: float

    @property
    def output_throughput(self) -> float:
        """Output tokens a second."""
        return self.num_output_tokens / self.duration_s


class EngineProcess:
    """An engine without a server, in a process of its own, while the `with` block runs.

    Entering waits until it is loaded. Raises ConfigError where it cannot be.
    """

    def __init__(self, model: str, config: EngineConfig) -> None:
        # Not forked: JAX's threads would not survive that.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run_engine, args=(theirs, model, config))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def __enter__(self) -> Self:
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def generate(self, workload: Workload) -> OfflineRun:
        """Runs requests to their end, all at once, timed inside the engine's own process."""
        self._connection.send(workload)
        run = self._answer()
        assert isinstance(run, OfflineRun)
        return run

    def _answer(self) -> object:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise ConfigError(
                "got no answer from the engine's process, which has ended; what it said stands"
                " above; mend that and try again"
            ) from None
        if isinstance(answer, ConfigError):
            raise answer
        return answer


def _run_engine(connection: Connection, model: str, config: EngineConfig) -> None:
    try:
        engine = Engine.load(model, config, lambda message: say(f"engine: {message}"))
    except ConfigError as error:
        connection.send(error)
        return
    with engine:
        connection.send(None)
        while True:
            try:
                workload = connection.recv()
            except EOFError:
                return
            requests = workload.requests(engine.model_config.vocab_size)
            connection.send(timed_generate(engine, requests))


def timed_generate(engine: Engine, requests: Sequence[Request]) -> OfflineRun:
    """Runs requests to their end. Raises the first error that ended one."""
    start_s = time.perf_counter()
    completions = engine.generate(requests)
    duration_s = time.perf_counter() - start_s
    for completion in completions:
        if completion.finish.error is not None:
            raise completion.finish.error
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    return OfflineRun(num_output_tokens=num_tokens, duration_s=duration_s)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a process holds, as /proc tells.

    Attributes:
        resident: in memory now (VmRSS).
        peak_resident: the most that ever was (VmHWM).
        proportional: in memory now, with pages that n processes share counted as 1/n (PSS).
        anonymous: of `resident`, what no file backs.
    """

    resident: int
    peak_resident: int
    proportional: int
    anonymous: int


def memory_of(pid: int) -> Memory:
    """Returns a process's memory. Raises OSError where it is gone or this is no Linux."""
    status = _kilobytes(Path(f"/proc/{pid}/status").read_text())
    rollup = _kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return Memory(
        resident=status["VmRSS"],
        peak_resident=status["VmHWM"],
        proportional=rollup["Pss"],
        anonymous=status["RssAnon"],
    )


def cpu_seconds_of(pid: int) -> float:
    """Returns the CPU time that a process has taken, all threads together, its children's apart.

    Raises OSError where it is gone or this is no Linux.
    """
    stat = Path(f"/proc/{pid}/stat").read_text()
    # The second field, the command's name, may hold spaces; proc(5) counts fields from 1.
    fields = stat.rpartition(")")[2].split()
    user, system = int(fields[14 - 3]), int(fields[15 - 3])
    return (user + system) / os.sysconf("SC_CLK_TCK")


class OthersClock:
    """Counts what else ran on this machine since it was made, beside this process and `pids`."""

    def __init__(self, *pids: int) -> None:
        self._pids = (os.getpid(), *pids)
        self._start_s = time.perf_counter()
        self._start_cpu_s = self._others_cpu_s()

    def cores(self) -> float:
        """Returns the cores that others took, on average since the start; about 0 where quiet."""
        cpu_s = self._others_cpu_s() - self._start_cpu_s
        return cpu_s / (time.perf_counter() - self._start_s)

    def _others_cpu_s(self) -> float:
        # proc(5): user, nice, system, idle, iowait, irq, softirq, steal, in ticks over all cores.
        line = Path("/proc/stat").read_text().splitlines()[0].split()
        user, nice, system, _, _, *interrupts = map(int, line[1:9])
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        return busy - sum(map(cpu_seconds_of, self._pids))


def _kilobytes(text: str) -> dict[str, int]:
    found = re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)
    return {name: 1024 * int(value) for name, value in found}
