"""A driver whose tokens come when its options say, for tests of what asks it.

Options: `step=SECONDS` of each token, `log=FILE` to write down each call, `fails=load`,
`fails=generate`, `fails=score`, `unable=generate`, `dies=generate`, `short` for a token too few,
`prints` to say something on standard output.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.driver import Note, Room, Score, UnableError


class Fake:
    def __init__(self, room: Room) -> None:
        self._options = dict(option.partition("=")[::2] for option in room.options)
        self.settings = {"threads": room.num_threads, "weight_bytes": 1000, "path": sys.path}
        self.versions = {"fake": "1.0"}
        self._told("load")

    def prepare(self, num_requests: int, request_len: int) -> None:
        self._write(f"prepare {num_requests} {request_len}")

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int, note: Note) -> None:
        self._told("generate")
        self._write(f"generate {len(prompts)} {len(prompts[0])} {output_len} {prompts[0][0]}")
        for _ in range(output_len - ("short" in self._options)):
            time.sleep(float(self._options.get("step", "0.001")))
            for index in range(len(prompts)):
                note(index, 1)

    def score(self, token_ids: Sequence[int]) -> Score:
        self._told("score")
        return Score(logprobs=[-1.5] * (len(token_ids) - 1), top=token_ids[1:])

    def _told(self, what: str) -> None:
        if "prints" in self._options:
            print("a library says something", flush=True)
            os.write(1, b"and so does one in C\n")
        if self._options.get("fails") == what:
            raise RuntimeError(f"no {what} today")
        if self._options.get("unable") == what:
            raise UnableError(f"it has no {what}")
        if self._options.get("dies") == what:
            os.write(2, b"out of memory\n")
            os._exit(3)

    def _write(self, line: str) -> None:
        if "log" in self._options:
            with Path(self._options["log"]).open("a") as log:
                log.write(f"{self._options.get('name', '')} {line}\n")


def load(room: Room) -> Fake:
    return Fake(room)
