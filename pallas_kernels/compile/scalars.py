"""Follows the few scalar instructions that count a loop, or compare its count with a constant."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_COMPARED = {
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
    "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
_MOST_TRIPS = 20_000


@dataclass(frozen=True)
class Counter:
    """A loop's count: the values that the scalar `name` takes in it."""

    name: str
    values: Sequence[int]


class Scalars:
    """What a kernel assigns to its scalars and predicates, by name."""

    def __init__(self, instructions: Iterable[str]) -> None:
        """Takes a kernel's instructions, without comments."""
        self._assigned: dict[str, list[str]] = {}
        for instruction in instructions:
            name, equals, value = instruction.partition(" = ")
            if equals:
                plain = re.sub(r" \(!?%\w+\),?", "", value)
                self._assigned.setdefault(name, []).append(plain)

    def counter(self, branch: str) -> Counter | None:
        """Returns what counts the loop that `branch` closes, where it counts up to a constant."""
        name = r"(%\w+)"
        if not (exit_test := re.search(rf"sbr\.rel \(!{name}\)", branch)):
            return None
        limit = self._find(exit_test[1], rf"scmp\.ge\.s32\.totalorder {name}, (\d+)")
        step = limit and self._find(limit[1], rf"sadd\.s32 (\d+), {name}")
        first = step and limit and self._find(step[2], rf"sphi {name}, {re.escape(limit[1])}")
        start = first and self._find(first[1], r"smov (\d+)")
        if not (limit and step and start and int(step[1])):
            return None
        # The test is at the end of the loop.
        values = range(int(start[1]), max(int(limit[2]), int(start[1]) + 1), int(step[1]))
        return Counter(step[2], values) if len(values) <= _MOST_TRIPS else None

    def is_skipped(self, branch: str, counter: Counter, value: int) -> bool | None:
        """Whether `branch` is taken when the loop's count is `value`; None where it also depends
        on something else."""
        if not (match := re.search(r"sbr\.rel \((!?)(%\w+)\)", branch)):
            return None
        holds = self._evaluate(match[2], counter.name, value)
        return None if holds is None else bool(holds) != bool(match[1])

    def _find(self, name: str, form: str) -> re.Match[str] | None:
        found = self._assigned.get(name, ())
        return re.fullmatch(form, found[0]) if len(found) == 1 else None

    def _evaluate(self, name: str, counter: str, value: int) -> int | None:
        """Returns a scalar, or 0 or 1 for a predicate, where it follows from the loop's count."""
        if name.isdigit():
            return _signed(int(name))
        if name == counter:
            return value
        if not (match := self._find(name, r"([\w.]+) ([%\w]+)(?:, ([%\w]+))?")):
            return None
        operation, operands = match[1], [part for part in match.groups()[1:] if part]
        parts = [self._evaluate(operand, counter, value) for operand in operands]
        if operation in ("por", "pnand") and len(parts) == 2:
            # One side may decide alone.
            decisive = 1 if operation == "por" else 0
            if decisive in parts:
                return 1
            return None if None in parts else 0
        known = [part for part in parts if part is not None]
        return _apply(operation, known) if len(known) == len(parts) else None


def _apply(operation: str, parts: list[int]) -> int | None:
    if operation == "pneg" and len(parts) == 1:
        return 1 - parts[0]
    if operation == "sadd.s32" and len(parts) == 2:
        return _signed(parts[0] + parts[1])
    if operation == "ssub.s32" and len(parts) == 2:
        return _signed(parts[0] - parts[1])
    compared = re.fullmatch(r"scmp\.(\w\w)\.s32\.totalorder", operation)
    if compared and compared[1] in _COMPARED and len(parts) == 2:
        return int(_COMPARED[compared[1]](*parts))
    return None


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31
