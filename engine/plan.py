"""What a step is to compute: rows of sequences, a part for each data shard."""

from dataclasses import dataclass, replace

from pallasite.engine.sequence import Sequence, State


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence's part of a step.

    Attributes:
        start: the position of the first token that is computed.
        num_tokens: how many are, drafted ones included.
        samples: whether a token is sampled after the last; after each where there is a draft.
        takes_previous: whether the first token is the slot's last sample, which the host may not
            have seen yet.
        draft: the tokens that are fed after the first one, to be verified.
    """

    sequence: Sequence
    slot: int
    start: int
    num_tokens: int
    samples: bool
    takes_previous: bool
    draft: tuple[int, ...] = ()

    @property
    def certain_end(self) -> int:
        """The position after the last token that is not drafted."""
        return self.start + self.num_tokens - len(self.draft)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One shard's part of a step: rows with a single token first, and who was just given a slot.

    A part may be empty, where others are not.
    """

    rows: list[Row]
    admitted: list[Sequence]
    num_decode: int

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step: one part for each shard, all of which run the same program.

    Attributes:
        num_steps: how often the program computes the rows, each time from what it sampled before.
    """

    parts: list[Part]
    num_steps: int = 1

    @property
    def rows(self) -> list[Row]:
        return [row for part in self.parts for row in part.rows]

    @property
    def admitted(self) -> list[Sequence]:
        return [sequence for part in self.parts for sequence in part.admitted]

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    @property
    def most_rows(self) -> int:
        """Rows of the part that has most."""
        return max(len(part.rows) for part in self.parts)

    @property
    def most_tokens(self) -> int:
        """Tokens of the part that has most."""
        return max(part.num_tokens for part in self.parts)

    @property
    def has_prefill(self) -> bool:
        """Whether any part has a row of more than one token, drafted ones aside."""
        return any(row.certain_end > row.start + 1 for row in self.rows)

    @property
    def has_drafts(self) -> bool:
        """Whether any row has drafted tokens."""
        return any(row.draft for row in self.rows)


def make_part(rows: list[Row], admitted: list[Sequence]) -> Part:
    """Orders the rows of a part."""
    num_decode = sum(row.num_tokens == 1 for row in rows)
    ordered = sorted(rows, key=lambda row: row.num_tokens > 1)
    return Part(rows=ordered, admitted=admitted, num_decode=num_decode)


def make_plan(parts: list[Part]) -> Plan | None:
    """Puts a step together; None where no part has a row."""
    return Plan(parts=parts) if any(part.rows for part in parts) else None


def without_ended(plan: Plan) -> Plan | None:
    """Returns what is left of a plan now that some of its sequences may have ended.

    They have lost their pages, so their rows would write to those of others.
    """
    parts = []
    for part in plan.parts:
        rows = [row for row in part.rows if row.sequence.state is State.RUNNING]
        parts.append(make_part(rows, part.admitted))
    return replace(plan, parts=parts) if any(part.rows for part in parts) else None
