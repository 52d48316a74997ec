"""Engines on a tiny model, made once a run and shared, and the leak audit after every test.

The model's weights are large enough that attention and feed-forward decide what comes next, so that
a wrong page or a wrong position gives other tokens.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from pallasite.engine import Completion, Engine, EngineConfig, Request, SamplingParams
from pallasite.engine.offline import collect
from pallasite.engine.plan import Plan
from pallasite.engine.sequence import State
from tests.engine.llama_oracle import LlamaOracle
from tests.tiny_checkpoints import TINY, random_tensors, write_hf

GROWTH = 6.0
"""How much larger the matrices are than a fresh model's."""

MAIN = EngineConfig(
    weights="f32",
    max_requests=8,
    max_batch_tokens=64,
    max_context_len=256,
    num_pages=160,
    max_leases=64,
)
"""Pages for all, and prompts of up to 64 tokens in one step."""

TIGHT = replace(MAIN, max_requests=4, max_batch_tokens=16, num_pages=16)
"""Chunks of at most 16 tokens, and pages for one whole context and no more."""


def lively_tensors() -> dict[str, np.ndarray]:
    """Returns the weights of the model that all engines here serve."""
    tensors = random_tensors(TINY)
    return {name: x * np.float32(GROWTH if x.ndim > 1 else 1) for name, x in tensors.items()}


ORACLE = LlamaOracle(TINY, lively_tensors())


@dataclass
class Engines:
    """The engines of a run, by configuration."""

    folder: Path
    compile_cache: Path
    _shared: dict[EngineConfig, Engine] = field(default_factory=dict)

    def __post_init__(self):
        self.checkpoint = write_hf(self.folder / "lively", TINY, lively_tensors())

    def get(self, config: EngineConfig = MAIN) -> Engine:
        """The engine that all tests with this configuration share."""
        if config not in self._shared:
            self._shared[config] = self._load(config, self.checkpoint)
        return self._shared[config]

    @contextmanager
    def fresh(
        self, config: EngineConfig = MAIN, checkpoint: Path | None = None
    ) -> Iterator[Engine]:
        """An engine of the test's own, audited and closed at the end."""
        with self._load(config, checkpoint or self.checkpoint) as engine:
            yield engine
            if engine.metrics.is_alive:
                assert_quiet(engine)

    def _load(self, config, checkpoint):
        return Engine.load(checkpoint, replace(config, compile_cache=self.compile_cache))

    def assert_quiet(self):
        for engine in self._shared.values():
            assert_quiet(engine)

    def close(self):
        for engine in self._shared.values():
            engine.close()
        self._shared.clear()


def engines_of_run(request: pytest.FixtureRequest) -> Engines:
    """The same for every conftest.py that asks."""
    stash = request.config.stash
    if _KEY not in stash:
        factory = request.getfixturevalue("tmp_path_factory")
        cache = request.getfixturevalue("compile_cache")
        stash[_KEY] = Engines(factory.mktemp("engines"), cache)
    return stash[_KEY]


_KEY = pytest.StashKey[Engines]()


def assert_quiet(engine: Engine, within_s: float = 30.0) -> None:
    """The leak audit: in time, all pages are free and nothing is open."""
    until = time.monotonic() + within_s
    while True:
        audit, load = engine.audit(), engine.current_load()
        state = {
            "free": audit.free == audit.total,
            "used": audit.used == 0,
            "leased": audit.leased == 0 and load.num_leased_pages == 0,
            "problems": audit.problems == (),
            "running": load.num_running == 0,
            "waiting": load.num_waiting == 0,
            "open": not engine._intake._groups,
        }
        if all(state.values()):
            return
        assert time.monotonic() < until, (audit, load)
        time.sleep(0.01)


def greedy(prompt, **params) -> Request:
    """A request whose answer is a function of its prompt."""
    fields = {name: params.pop(name) for name in _REQUEST_FIELDS & params.keys()}
    return Request(
        prompt_ids=tuple(prompt), params=SamplingParams(temperature=0.0, **params), **fields
    )


_REQUEST_FIELDS = {"request_id", "priority", "timeout_s", "tenant"}


def random_prompt(rng: np.random.Generator, length: int) -> tuple[int, ...]:
    """Ids of bytes, no special token among them."""
    return tuple(rng.integers(0, 256, length).tolist())


def random_params(rng: np.random.Generator, max_tokens: int = 24) -> SamplingParams:
    """Parameters that touch every stage of the sampler, each in about a third of the draws."""

    def maybe(value, otherwise):
        return value if rng.random() < 0.35 else otherwise

    ids = [int(i) for i in rng.integers(0, TINY.vocab_size, 12)]
    return SamplingParams(
        max_tokens=int(rng.integers(1, max_tokens + 1)),
        min_tokens=0,
        n=maybe(int(rng.integers(2, 4)), 1),
        temperature=maybe(0.0, float(rng.uniform(0.3, 1.5))),
        top_k=maybe(int(rng.integers(1, 50)), 0),
        top_p=maybe(float(rng.uniform(0.2, 1.0)), 1.0),
        min_p=maybe(float(rng.uniform(0.0, 0.3)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.8, 1.5)), 1.0),
        presence_penalty=maybe(float(rng.uniform(-1, 1)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-1, 1)), 0.0),
        logit_bias=maybe({i: float(rng.uniform(-3, 3)) for i in ids[:4]}, {}),
        allowed_token_ids=maybe(tuple(range(40)), None),
        bad_words=maybe(((ids[4],), (ids[5], ids[6]), (ids[7], ids[8], ids[9])), ()),
        seed=maybe(int(rng.integers(0, 2**63)), None),
        logprobs=maybe(int(rng.integers(0, 21)), None),
        prompt_logprobs=maybe(int(rng.integers(0, 21)), None),
        stop_token_ids=maybe((ids[10], ids[11]), ()),
        include_stop=bool(rng.random() < 0.5),
        ignore_eos=bool(rng.random() < 0.5),
    )


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


def one_by_one(engine: Engine, requests: list[Request]) -> list[Completion]:
    """Each request alone in the engine."""
    return [completion for request in requests for completion in engine.generate([request])]


@contextmanager
def recorded_plans(engine: Engine, monkeypatch) -> Iterator[list[Plan]]:
    """Every step's plan, in order, as the loop makes them."""
    plans: list[Plan] = []
    schedule = engine._scheduler.schedule

    def record(now):
        plan = schedule(now)
        if plan is not None:
            plans.append(plan)
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "schedule", record)
        yield plans


@contextmanager
def held_open(engine: Engine, monkeypatch, max_tokens: int) -> Iterator[None]:
    """Within the block, requests of so many tokens do not end before the test has done its part.

    Past their first tokens they take the steps that others need, and two for each thing that the
    engine is asked. So there is one on the device when the next thing is done.
    """
    schedule, intake = engine._scheduler.schedule, engine._intake
    is_over = threading.Event()
    num_at_rest = 0

    def is_begun(sequence):
        return sequence.num_completed > 0 and sequence.request.params.max_tokens == max_tokens

    def is_at_rest():
        running = [s for s in engine._scheduler.sequences() if s.state is State.RUNNING]
        may_start = engine._scheduler.num_waiting and len(running) < engine.config.max_requests
        is_asked = intake._commands or intake._queued or intake.is_closed or is_over.is_set()
        return running and all(map(is_begun, running)) and not may_start and not is_asked

    def schedule_for_others(now):
        nonlocal num_at_rest
        num_at_rest = num_at_rest + 1 if is_at_rest() else 0
        if num_at_rest > 1:  # what the last step brought is delivered after one more is planned
            while is_at_rest():
                intake.wait(0.05)
            num_at_rest = 0
        return schedule(now)

    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "schedule", schedule_for_others)
        try:
            yield
        finally:
            is_over.set()


class LoopGate:
    """Lets an engine's loop go round only when told."""

    def __init__(self) -> None:
        self._may_go = threading.Semaphore(0)
        self._has_come = threading.Semaphore(0)
        self._is_open = False

    def wrap(self, schedule):
        def wait_and_schedule(now):
            if not self._is_open:
                self._has_come.release()
                self._may_go.acquire()
            return schedule(now)

        return wait_and_schedule

    def arrive(self) -> None:
        """Waits until the loop has done what it was asked, and is about to plan a step."""
        assert self._has_come.acquire(timeout=60)

    def step(self, count: int = 1) -> None:
        """Has it plan, launch and commit, and come here again, `count` times."""
        for _ in range(count):
            self._may_go.release()
            self.arrive()

    def open(self) -> None:
        self._is_open = True
        self._may_go.release()


@contextmanager
def stepped(engine: Engine, monkeypatch) -> Iterator[LoopGate]:
    """Within the block the engine's loop waits for each `LoopGate.step`."""
    gate = LoopGate()
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "schedule", gate.wrap(engine._scheduler.schedule))
        try:
            gate.arrive()
            yield gate
        finally:
            gate.open()


def taken_in_together(engine: Engine, requests: list[Request], monkeypatch) -> list[Completion]:
    """What `generate` returns, where the engine learns of all requests at one turn of its loop."""
    with stepped(engine, monkeypatch):
        streams = [engine.submit(request) for request in requests]
        for stream in streams:
            stream.is_bounded = False
    taken = iter(streams)
    return collect(lambda request: next(taken), requests)
