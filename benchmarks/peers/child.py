"""The program that each engine runs in, with its own Python: a line of JSON in, a line out.

    python -P benchmarks/peers/child.py benchmarks.peers.openvino

    {"do": "load", "room": {...}}                       -> {"settings": {...}, "versions": {...}}
    {"do": "prepare", "num_requests": 1, "request_len": 9}  -> {}
    {"do": "generate", "prompts": [...], "output_len": 8} -> {"duration_s": 1.2, "times_s": [...]}
    {"do": "score", "token_ids": [...]}                 -> {"logprobs": [...], "top": [...]}

An answer may be {"unable": why} or {"failed": why} instead. It ends with its input. What libraries
print goes to standard error. It imports nothing but the standard library and one driver.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

# Last, so that no folder of the repository hides an installed package of the same name.
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.peers.driver import Driver, Room, UnableError


def main(module: str) -> None:
    answers = _own_output()
    driver: Driver | None = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question["do"] == "load":
                driver = _load(module, question["room"])
                answer = {"settings": driver.settings, "versions": driver.versions}
            else:
                assert driver is not None
                answer = ACTIONS[question["do"]](driver, question)
        except UnableError as error:
            answer = {"unable": str(error)}
        except Exception as error:  # noqa: BLE001 (an engine may raise anything; its parent tells)
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _own_output() -> TextIO:
    """Returns standard output for answers alone; what others print there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _load(module: str, room: dict[str, Any]) -> Driver:
    given = Room(**{**room, "options": tuple(room["options"])})
    if hasattr(os, "sched_setaffinity"):
        # No more cores than threads, whatever an engine makes of its settings.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.num_threads])
    driver: Driver = importlib.import_module(module).load(given)
    return driver


def _prepare(driver: Driver, question: dict[str, Any]) -> dict[str, Any]:
    driver.prepare(question["num_requests"], question["request_len"])
    return {}


def _generate(driver: Driver, question: dict[str, Any]) -> dict[str, Any]:
    prompts = question["prompts"]
    times_s: list[list[float]] = [[] for _ in prompts]
    start_s = time.perf_counter()

    def note(index: int, num_tokens: int) -> None:
        times_s[index] += [time.perf_counter() - start_s] * num_tokens

    driver.generate(prompts, question["output_len"], note)
    return {"duration_s": time.perf_counter() - start_s, "times_s": times_s}


def _score(driver: Driver, question: dict[str, Any]) -> dict[str, Any]:
    score = driver.score(question["token_ids"])
    return {"logprobs": [float(x) for x in score.logprobs], "top": [int(x) for x in score.top]}


ACTIONS = {"prepare": _prepare, "generate": _generate, "score": _score}

if __name__ == "__main__":
    main(sys.argv[1])
