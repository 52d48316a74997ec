"""An engine in a process of its own, spoken to in lines of JSON. See `child.py`."""

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.peers.driver import Room, Score

CHILD = Path(__file__).with_name("child.py")
ANSWER_S = 1800.0
"""How long an answer may take; whoever takes longer is killed."""

STOP_S = 30.0


class PeerError(Exception):
    """An engine could not do what it was asked, for the reason that the text gives."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What runs an engine.

    Attributes:
        name: the engine's.
        python: the interpreter of its environment.
        module: its driver.
        environment: variables that it needs; one that is None is taken away.
    """

    name: str
    python: Path
    module: str
    environment: Mapping[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """When the tokens of requests came that were sent together, in seconds after the call.

    Attributes:
        duration_s: of the whole call.
        times_s: each token of each request.
    """

    duration_s: float
    times_s: tuple[tuple[float, ...], ...]


class PeerProcess:
    """An engine, until the `with` block ends. Every method raises PeerError where it cannot.

    Attributes:
        started_s: when the process began, on the monotonic clock.
        settings, versions: what the driver says of itself once it is loaded.
    """

    def __init__(self, program: Program) -> None:
        self.settings: Mapping[str, Any] = {}
        self.versions: Mapping[str, str] = {}
        # Closed with the process.
        self._said = tempfile.TemporaryFile(  # noqa: SIM115
            "w+", encoding="utf-8", errors="replace"
        )
        environment = {**os.environ, **program.environment}
        self.started_s = time.monotonic()
        try:
            self._process = subprocess.Popen(
                [program.python, "-P", CHILD, program.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env={name: value for name, value in environment.items() if value is not None},
            )
        except OSError as error:
            self._said.close()
            raise PeerError(f"{program.name} cannot be started: {error.strerror}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; again is no error."""
        if self._said.closed:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(STOP_S)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def load(self, room: Room) -> None:
        """Loads the model."""
        answer = self._ask({"do": "load", "room": asdict(room)})
        self.settings, self.versions = answer["settings"], answer["versions"]

    def prepare(self, num_requests: int, request_len: int) -> None:
        """Makes room for so many requests at once of so many tokens each."""
        self._ask({"do": "prepare", "num_requests": num_requests, "request_len": request_len})

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Tokens:
        """Completes all prompts at once; each must get `output_len` tokens."""
        answer = self._ask({"do": "generate", "prompts": prompts, "output_len": output_len})
        times_s = tuple(tuple(times) for times in answer["times_s"])
        counts = sorted({len(times) for times in times_s})
        if counts != [output_len]:
            raise PeerError(f"it made completions of {counts} tokens; asked for was {output_len}")
        return Tokens(duration_s=answer["duration_s"], times_s=times_s)

    def score(self, token_ids: Sequence[int]) -> Score:
        """Scores a text."""
        answer = self._ask({"do": "score", "token_ids": token_ids})
        if not len(answer["logprobs"]) == len(answer["top"]) == len(token_ids) - 1:
            raise PeerError(
                f"it scored {len(answer['logprobs'])} and {len(answer['top'])} places of"
                f" {len(token_ids) - 1}"
            )
        return Score(logprobs=answer["logprobs"], top=answer["top"])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(ANSWER_S, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise PeerError(self._end())
        answer: dict[str, Any] = json.loads(line)
        for kind in ("unable", "failed"):
            if kind in answer:
                raise PeerError(answer[kind])
        return answer

    def _end(self) -> str:
        """How a process ended that should not have."""
        try:
            status = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()]
        last = lines[-1] if lines else "nothing"
        return f"its process ended with status {status}; it last said: {last}"
