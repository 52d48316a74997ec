"""One step, from plan to events: slots filled, words built, its program launched, its results read.

It knows the device and the step's own sequences; who asks for what, and when a step is due, is the
loop's, in `engine/engine.py`.
"""

import logging
import time
from dataclasses import dataclass

import jax
import numpy as np

from pallasite.engine.batch_builder import BatchBuilder
from pallasite.engine.bursts import Bursts
from pallasite.engine.commit import Committer, Grant
from pallasite.engine.config import EngineConfig
from pallasite.engine.dispatcher import Dispatcher
from pallasite.engine.errors import internal_error
from pallasite.engine.layout import Bucket
from pallasite.engine.metrics import EngineMetrics
from pallasite.engine.plan import Plan, without_ended
from pallasite.engine.programs import EDIT_TOKENS
from pallasite.engine.runtime import Runtime
from pallasite.engine.sampler_state import slot_edits
from pallasite.engine.sequence import Sequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A step on the device, and the plan it runs."""

    plan: Plan
    bucket: Bucket
    results: jax.Array
    scores: jax.Array | None
    started_s: float


class Stepper:
    """Runs plans on a runtime, and counts what they cost."""

    def __init__(
        self,
        runtime: Runtime,
        config: EngineConfig,
        scheduler: Dispatcher,
        committer: Committer,
        metrics: EngineMetrics,
    ) -> None:
        num_slots = config.max_requests // runtime.num_shards
        self._runtime = runtime
        self._builder = BatchBuilder(runtime.layouts, runtime.num_shards, num_slots)
        self._committer = committer
        self._bursts = Bursts(scheduler, config.max_unread_tokens)
        self._metrics = metrics

    def launch(self, plan: Plan) -> Launched | None:
        """Puts a step on the device and returns at once; None where nothing of it can run.

        A sequence whose slot cannot be prepared ends with an error, and the others go on.
        """
        ready = self._prepare(plan)
        return None if ready is None else self._run(ready)

    def commit(self, launched: Launched, grant: Grant) -> None:
        """Waits for a step's results, and appends its tokens; `grant` leases what is to be held."""
        # The one read of a step. Scores, which few steps have, are read beside it.
        results = np.asarray(launched.results)
        scores = None if launched.scores is None else np.asarray(launched.scores)
        plan = launched.plan
        self._bursts.note(launched.bucket, plan.num_steps, time.monotonic() - launched.started_s)
        for step in range(plan.num_steps):
            num_tokens = self._committer.commit(plan, results[:, step], scores, grant)
            self._metrics.generation_tokens += num_tokens
        self._metrics.accepted_tokens = self._committer.accepted_tokens

    def _prepare(self, plan: Plan) -> Plan | None:
        """Fills the slots that were just given; returns the plan of those that could be filled."""
        for sequence in plan.admitted:
            try:
                self._admit(sequence)
            except Exception as error:  # one request's fault must not end the others
                logger.exception("a request could not be prepared; it alone ends")
                self._committer.fail(sequence, internal_error(error))
        return without_ended(plan)

    def _admit(self, sequence: Sequence) -> None:
        self._builder.admit(sequence)
        prompt_ids = sequence.request.prompt_ids
        output_ids = sequence.token_ids[len(prompt_ids) :]
        params = sequence.request.params
        for edit in slot_edits(params, prompt_ids, output_ids, sequence.slot, EDIT_TOKENS):
            self._runtime.edit(edit, sequence.shard)

    def _run(self, plan: Plan) -> Launched:
        started_s = time.monotonic()
        bucket = self._runtime.bucket_for(plan)
        plan = self._bursts.extended(plan, bucket)
        words = self._builder.build(plan, bucket, self._runtime.model_config.eos_token_ids)
        results, scores = self._runtime.run(bucket, words)
        results.copy_to_host_async()
        self._metrics.num_steps += plan.num_steps
        drafts = [len(row.draft) for row in plan.rows if row.draft]
        self._metrics.num_drafts += len(drafts)
        self._metrics.draft_tokens += sum(drafts)
        num_padded = len(plan.parts) * bucket.num_tokens - plan.num_tokens
        self._metrics.padded_tokens += plan.num_steps * num_padded
        has_scores = any(row.sequence.needs_scores for row in plan.rows)
        return Launched(
            plan=plan,
            bucket=bucket,
            results=results,
            scores=scores if has_scores else None,
            started_s=started_s,
        )
