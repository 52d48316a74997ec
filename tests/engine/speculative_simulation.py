"""The simulated engine with drafts, some of them right, in any mix with steps that have none.

As in the engine, a step with drafts is committed before the next is planned, and drafts are added
only to a step that is planned while nothing is in flight.
"""

import numpy as np

from pallasite.engine.plan import Plan, Row, make_part
from tests.engine.scheduler_simulation import Simulation

WRONG = 10**6
"""A token that the model never says."""


class SpeculativeSimulation(Simulation):
    """Drafts up to num_drafts tokens a row, more or fewer of them right, as a seed has it.

    Attributes:
        waits: how often a step without drafts is committed before the next is planned, too.
    """

    def __init__(self, *, seed: int, num_drafts: int = 5, **sizes: int) -> None:
        super().__init__(**sizes)
        self.num_accepted = 0
        self.waits = 0.5
        self._num_drafts = num_drafts
        self._rng = np.random.default_rng(seed)

    def _plan(self) -> Plan | None:
        if self._previous is not None and (
            self._previous.has_drafts or self._rng.random() < self.waits
        ):
            self._commit_previous()
        plan = self.scheduler.schedule(0.0)
        if plan is None or self._previous is not None or plan.has_prefill:
            return plan
        parts = []
        for part in plan.parts:
            room = self.max_tokens - part.num_tokens
            rows = []
            for row in part.rows:
                draft = self._draft(row)[: max(0, room)]
                rows.append(self.scheduler.with_draft(row, draft) if draft else row)
                room -= len(rows[-1].draft)
            parts.append(make_part(rows, part.admitted))
        drafted = Plan(parts=parts)
        self.num_accepted += sum(map(self._num_right, drafted.rows))
        return drafted

    def _draft(self, row: Row) -> tuple[int, ...]:
        """Some right tokens, and some wrong ones after them."""
        if not row.samples or self._rng.random() < 0.3:
            return ()
        most = min(self._num_drafts, row.sequence.num_unsampled)
        num_right = int(self._rng.integers(0, most + 1))
        right = [self._sampled(row.sequence, row.certain_end + place) for place in range(num_right)]
        return (*right, *[WRONG] * (int(self._rng.integers(num_right, most + 1)) - num_right))
