"""Engines that draft in tests: whatever it costs, and from answers that are known."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from pallasite.engine import Completion, Engine, EngineConfig, Request
from pallasite.engine.drafter import Draft
from pallasite.engine.speculation import Speculator
from tests.engine.harness import MAIN, TIGHT, Engines

DRAFTING = replace(MAIN, speculate="ngram", speculate_tokens=4)
TIGHT_DRAFTING = replace(TIGHT, speculate="ngram", speculate_tokens=3)


def eager(engine: Engine) -> Engine:
    """Has an engine take every step to last the same, so that every draft pays."""
    seconds = {bucket: 1.0 for bucket in engine._runtime.programs.buckets if not bucket.has_prefill}
    engine._speculator = Speculator(engine._scheduler, engine.config.num_drafts, seconds)
    return engine


@contextmanager
def eager_engine(engines: Engines, config: EngineConfig = DRAFTING) -> Iterator[Engine]:
    """An engine of the test's own whose every draft pays."""
    with engines.fresh(config) as engine:
        yield eager(engine)


@contextmanager
def foreseen(
    engine: Engine, requests: Sequence[Request], answers: Sequence[Completion], monkeypatch
) -> Iterator[None]:
    """Within the block, drafts are the known answers with a wrong token here and there.

    `answers` are to `requests`, n each; what a stop has cut off is not known.
    """
    keys = [(r.prompt_ids, r.params, index) for r in requests for index in range(r.params.n)]
    known = {
        key: answer.token_ids for key, answer in zip(map(_hashable, keys), answers, strict=True)
    }
    rng = np.random.default_rng(0)

    def draft(speculator, sequence, most):
        request = sequence.request
        ids = known[_hashable((request.prompt_ids, request.params, sequence.index))]
        place = sequence.num_completed
        foreseen = list(ids[place : place + min(most, engine.config.num_drafts)])
        if foreseen and rng.random() < 0.4:
            foreseen[int(rng.integers(0, len(foreseen)))] = int(rng.integers(0, 256))
        return Draft(token_ids=tuple(foreseen), chance=0.9) if foreseen else None

    with monkeypatch.context() as patch:
        patch.setattr(Speculator, "_draft", draft)
        yield


def _hashable(key: object) -> str:
    return repr(key)
