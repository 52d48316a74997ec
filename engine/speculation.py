"""Which drafts a step verifies: as many as promise most tokens a second.

A verified token costs time, most where a device is busy with one token already, and is worth only
its chance to be right. So the seconds of every program, measured at the start, and the chances that
each sequence has learned decide together; where nothing pays, a step is an ordinary one.
"""

from collections.abc import Iterable, Iterator, Mapping

from pallasite.engine.dispatcher import Dispatcher
from pallasite.engine.drafter import Draft, Drafter
from pallasite.engine.layout import Bucket
from pallasite.engine.plan import Part, Plan, Row, make_part
from pallasite.engine.sequence import Sequence, State

MARGIN = 1.05
"""How many times as many tokens a second drafts must promise as none do."""


class Speculator:
    """Adds drafts to plans.

    `seconds` are of a step of each bucket, all of it in use; a table without verify buckets, such
    as an empty one, has no room for drafts.
    """

    def __init__(
        self, scheduler: Dispatcher, num_drafts: int, seconds: Mapping[Bucket, float]
    ) -> None:
        self._scheduler = scheduler
        self._num_drafts = num_drafts
        self._decode_s = {b.num_rows: seconds[b] for b in sorted(seconds) if not b.num_drafts}
        self._verify_s = {b.num_tokens: seconds[b] for b in sorted(seconds) if b.num_drafts}

    def awaits_tokens(self) -> bool:
        """Whether a draft would pay once the tokens in flight are known, as far as one can tell.

        It can be told by the tokens before those: what is on its way repeats where they did.
        """
        if not self._num_drafts:
            return False
        drafts: list[list[Draft | None]] = [[] for _ in self._scheduler.pools]
        for sequence in self._scheduler.sequences():
            if sequence.state is State.RUNNING and sequence.num_unsampled > 0:
                drafts[sequence.shard].append(self._draft(sequence, sequence.num_unsampled - 1))
        return self._num_tokens(drafts) > 0

    def with_drafts(self, plan: Plan) -> Plan:
        """Returns a plan, made while nothing was in flight, with the drafts that pay.

        A step that computes prompts has none.
        """
        if not self._num_drafts or plan.has_prefill:
            return plan
        drafts = [[self._draft_of(row) for row in part.rows] for part in plan.parts]
        num_tokens = self._num_tokens(drafts)
        if not num_tokens:
            return plan
        parts = [
            self._part(part, own, num_tokens) for part, own in zip(plan.parts, drafts, strict=True)
        ]
        return Plan(parts=parts)

    def _draft_of(self, row: Row) -> Draft | None:
        return self._draft(row.sequence, row.sequence.num_unsampled) if row.samples else None

    def _draft(self, sequence: Sequence, most: int) -> Draft | None:
        most = min(most, self._num_drafts)
        if most < 1:
            return None
        if sequence.drafter is None:
            sequence.drafter = Drafter()
        return sequence.drafter.draft(sequence.token_ids, most)

    def _num_tokens(self, drafts: list[list[Draft | None]]) -> int:
        """Returns the tokens of the verify step that pays best for rows with these drafts.

        Each shard's are in a list of their own. 0 where no such step pays.
        """
        if not self._verify_s or not any(draft for own in drafts for draft in own):
            return 0
        chances = [[chance for chance, *_ in _ranked(own)] for own in drafts]
        num_rows = [len(own) for own in drafts]
        decode_s = next(s for rows, s in self._decode_s.items() if rows >= max(num_rows))
        best, best_rate = 0, MARGIN * sum(num_rows) / decode_s
        for num_tokens, seconds in self._verify_s.items():
            rooms = [num_tokens - count for count in num_rows]
            if min(rooms) < 1:
                continue
            gained = sum(sum(own[:room]) for own, room in zip(chances, rooms, strict=True))
            rate = (sum(num_rows) + gained) / seconds
            if rate > best_rate:
                best, best_rate = num_tokens, rate
        return best

    def _part(self, part: Part, drafts: list[Draft | None], num_tokens: int) -> Part:
        """Returns a part of `num_tokens` at most, with the likeliest of the drafts' tokens."""
        counts = [0] * len(drafts)
        room = num_tokens - len(drafts)
        for _, _, index in _ranked(drafts)[:room]:
            counts[index] += 1
        rows = [
            self._scheduler.with_draft(row, draft.token_ids[:count]) if draft and count else row
            for row, draft, count in zip(part.rows, drafts, counts, strict=True)
        ]
        return make_part(rows, part.admitted)


def _ranked(drafts: Iterable[Draft | None]) -> list[tuple[float, int, int]]:
    """Returns (chance, place, row) of every drafted token, the likeliest first.

    A token's chance is that of all before it, too, so that it comes after them.
    """

    def tokens() -> Iterator[tuple[float, int, int]]:
        for index, draft in enumerate(drafts):
            if draft is not None:
                for place in range(len(draft.token_ids)):
                    yield draft.chance ** (place + 1), place, index

    return sorted(tokens(), key=lambda token: (-token[0], token[1], token[2]))
