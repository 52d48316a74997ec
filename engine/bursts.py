"""How many steps one launch makes.

Where the cores that compute are the host's own, every launch keeps them from computing while the
host reads, decides and launches. Steps that only decode need nothing of it in between: what one
samples is what the next one is fed. So a launch makes several, as long as nobody has to wait for
it: a request that arrives meanwhile is taken in after the last of them. Nor may their tokens, which
come to a reader together, be more than it may lag.
"""

from collections import Counter

from pallasite.engine.dispatcher import Dispatcher
from pallasite.engine.layout import Bucket
from pallasite.engine.plan import Plan, Row
from pallasite.engine.sequence import Sequence

MAX_STEPS = 16
"""The most that a program makes in one launch."""

LONGEST_S = 0.1
"""Seconds that a launch of more than one step takes at most, as far as the last ones tell."""


class Bursts:
    """Chooses how many steps a launch makes, and learns how long they take.

    `max_unread_tokens` are those that a stream's reader may lag.
    """

    def __init__(self, scheduler: Dispatcher, max_unread_tokens: int) -> None:
        self._scheduler = scheduler
        self._max_unread_tokens = max_unread_tokens
        self._step_s: dict[Bucket, float] = {}

    def note(self, bucket: Bucket, num_steps: int, seconds: float) -> None:
        """Takes in how long a launch of so many steps took, from its words to its results."""
        step_s = seconds / num_steps
        known_s = self._step_s.get(bucket, step_s)
        self._step_s[bucket] = known_s + (step_s - known_s) / 8

    def extended(self, plan: Plan, bucket: Bucket) -> Plan:
        """Returns a plan with as many steps as are good; their tokens have pages, too."""
        num_steps = self._num_steps(plan, bucket)
        if num_steps < 2 or not self._scheduler.go_on(plan, num_steps - 1):
            return plan
        return Plan(parts=plan.parts, num_steps=num_steps)

    def _num_steps(self, plan: Plan, bucket: Bucket) -> int:
        if bucket.max_steps == 1 or self._scheduler.num_waiting or bucket not in self._step_s:
            return 1
        rows = plan.rows
        if not all(row.samples and not _may_ban(row.sequence) for row in rows):
            return 1
        num_unsampled = min(row.sequence.num_unsampled for row in rows)
        in_time = int(LONGEST_S / self._step_s[bucket])
        return min(bucket.max_steps, 1 + num_unsampled, in_time, self._num_readable(rows))

    def _num_readable(self, rows: list[Row]) -> int:
        """Returns after how many steps no reader lags too far, if none reads meanwhile."""
        counts = Counter(row.sequence.group.stream for row in rows)
        return min(
            (
                (self._max_unread_tokens - stream.num_unread) // num_rows
                for stream, num_rows in counts.items()
                if stream.is_bounded
            ),
            default=MAX_STEPS,
        )


def _may_ban(sequence: Sequence) -> bool:
    """Whether what a planned row may not sample changes with its tokens, which the host lacks."""
    params = sequence.request.params
    return bool(params.bad_words) or sequence.num_sampled <= params.min_tokens
