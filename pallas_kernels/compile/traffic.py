"""What each instruction of a program for a TPU moves to and from device memory, by its text.

Arrays that XLA keeps in memory on the chip cost nothing here. Sizes are those of whole tiles, as
copies move them. The text is that of an optimized program, in which shapes have layouts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^ +(?:ROOT )?%([\w.-]+) = ")
_FREE = {
    "bitcast",
    "constant",
    "copy-done",
    "get-tuple-element",
    "parameter",
    "partition-id",
    "slice-done",
    "dynamic-slice-done",
    "tuple",
}
"""What moves nothing, or ends what another instruction has begun."""
_SLICES = {"slice", "dynamic-slice"}


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One of those that XLA runs one after another.

    Attributes:
        name: XLA's.
        opcode: such as fusion, copy or custom-call.
        times: how often it runs, by the counts of the loops around it.
        bytes_read: from device memory, each time; of a Pallas call None, since its operands do
            not tell.
        bytes_written: to device memory, each time.
        bundles: instruction words, each time; None where they were not asked for, or where there
            are none or not known.
    """

    name: str
    opcode: str
    times: int
    bytes_read: int | None
    bytes_written: int | None
    bundles: int | float | None = None


def instructions(text: str) -> tuple[Instruction, ...]:
    """Returns what a program runs, in its order; raises ValueError for a loop of unknown count."""
    program = _Program(text)
    return tuple(program.run(program.entry, 1))


@dataclass(frozen=True)
class _Line:
    """One instruction of the text.

    Attributes:
        form: its result's type.
        operands: the names of them.
        rest: what follows them.
    """

    name: str
    form: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def called(self, role: str) -> str:
        """The computation that it calls as its `role`, such as calls, body or condition."""
        match = re.search(rf"\b{role}=%([\w.-]+)", self.rest)
        if match is None:
            raise ValueError(f"got no {role} of the instruction {self.name}")
        return match[1]


class _Program:
    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, _Line]] = {}
        self.entry = ""
        # Metadata of some instructions have lines of their own.
        for piece in re.split(r"^(?=(?:ENTRY )?%[\w.-]+ \()", text, flags=re.M)[1:]:
            header, _, body = piece.partition("\n")
            if not (match := _HEADER.match(header)):
                continue
            parts = re.split(r"^(?= +(?:ROOT )?%[\w.-]+ = )", body, flags=re.M)
            lines = [_line(part) for part in parts if _NAME.match(part)]
            self.computations[match[2]] = {line.name: line for line in lines}
            if match[1]:
                self.entry = match[2]

    def run(self, computation: str, times: int) -> Iterator[Instruction]:
        lines = self.computations[computation]
        for line in lines.values():
            if line.opcode == "while":
                trips = self.trips(line, lines)
                yield from self.run(line.called("body"), times * trips)
            elif line.opcode == "conditional":
                for branch in re.findall(r"%([\w.-]+)", line.rest.partition("}")[0]):
                    if branch in self.computations:
                        yield from self.run(branch, times)
            elif line.opcode not in _FREE and "ConcatBitcast" not in line.rest:
                yield self.instruction(line, lines, times)

    def instruction(self, line: _Line, lines: dict[str, _Line], times: int) -> Instruction:
        counted = Instruction(
            name=line.name, opcode=line.opcode, times=times, bytes_read=None, bytes_written=None
        )
        if "tpu_custom_call" in line.rest:
            return counted
        if line.opcode.endswith("-start"):
            # Its result is what it writes, beside what it reads.
            to, source = _moved(line, lines)
            size = min(_bytes(to), _bytes(source))
            return replace(
                counted,
                bytes_read=size if _is_far(source) else 0,
                bytes_written=size if _is_far(to) else 0,
            )
        if line.opcode == "fusion":
            inner = self.computations[line.called("calls")]
            read = sum(
                self.read(inner, index)
                for index, operand in enumerate(line.operands)
                if _is_far(lines[operand].form)
            )
            written = self.written(inner, line.form)
        elif line.opcode in _SLICES:
            read = _bytes(line.form) if _is_far(lines[line.operands[0]].form) else 0
            written = _far_bytes(line.form)
        else:
            read = sum(_far_bytes(lines[operand].form) for operand in line.operands)
            written = _far_bytes(line.form)
        return replace(counted, bytes_read=read, bytes_written=written)

    def read(self, inner: dict[str, _Line], index: int) -> int:
        """Returns how much of its parameter of that number a fusion reads."""
        (parameter,) = [
            line
            for line in inner.values()
            if line.opcode == "parameter" and line.rest.startswith(f"({index})")
        ]
        return min(self.used(inner, parameter), _bytes(parameter.form))

    def used(self, inner: dict[str, _Line], value: _Line) -> int:
        total = 0
        for line in inner.values():
            for position, operand in enumerate(line.operands):
                if operand != value.name:
                    continue
                if line.opcode in _SLICES and position == 0:
                    total += _bytes(line.form)
                elif line.opcode == "dynamic-update-slice" and position == 0:
                    total += 0
                elif line.opcode == "bitcast" or "output_to_operand_aliasing" in line.rest:
                    total += _bytes(value.form) if line.is_root else self.used(inner, line)
                elif line.opcode == "fusion":
                    total += self.read(self.computations[line.called("calls")], position)
                elif not line.is_root or line.opcode != "tuple":
                    total += _bytes(value.form)
        return total

    def written(self, inner: dict[str, _Line], form: str) -> int:
        """Returns what a fusion writes of its result."""
        (root,) = [line for line in inner.values() if line.is_root]
        roots = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        total = 0
        for part, array in zip(roots, _ARRAY.finditer(form), strict=True):
            if _is_far(array[0]):
                while part.opcode == "bitcast":
                    part = inner[part.operands[0]]
                if part.opcode == "dynamic-update-slice":
                    total += _bytes(inner[part.operands[1]].form)
                else:
                    total += _bytes(array[0])
        return total

    def trips(self, line: _Line, lines: dict[str, _Line]) -> int:
        """Returns how often a loop runs that counts from one constant to another by one."""
        condition = self.computations[line.called("condition")]
        (root,) = [inner for inner in condition.values() if inner.is_root]
        first, limit = (condition[name] for name in root.operands)
        start = _constant(self.initial(lines[line.operands[0]], lines, first))
        end = _constant(self.initial(lines[line.operands[0]], lines, limit))
        if start is None or end is None or "direction=LT" not in root.rest:
            raise ValueError(f"got the loop {line.name}, whose count the program does not say")
        return end - start

    def initial(self, carried: _Line, lines: dict[str, _Line], value: _Line) -> _Line:
        """Returns what a value in a loop's condition is before the loop."""
        if value.opcode != "get-tuple-element":
            return value
        match = re.search(r"index=(\d+)", value.rest)
        assert match is not None
        found = lines[carried.operands[int(match[1])]]
        while found.opcode in ("copy", "bitcast"):
            found = lines[found.operands[0]]
        return found


def _line(text: str) -> _Line:
    name = _NAME.match(text)
    assert name is not None
    rest = text[name.end() :]
    form_end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    form, rest = rest[:form_end], rest[form_end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside, after = rest[len(opcode) + 1 : end - 1], rest[end:]
    if opcode in ("parameter", "constant"):
        after = f"({inside}){after}"
    return _Line(
        name=name[1],
        form=form,
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.-]+)", inside)),
        rest=after,
        is_root="ROOT" in name[0],
    )


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis at `start` ends."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"got an instruction whose parentheses do not close: {text[:200]}")


def _constant(line: _Line) -> int | None:
    match = re.match(r"\((-?\d+)\)", line.rest)
    return int(match[1]) if line.opcode == "constant" and match else None


def _moved(line: _Line, lines: dict[str, _Line]) -> tuple[str, str]:
    """Returns the types of what an asynchronous copy or slice writes, and of what it reads."""
    arrays = [match[0] for match in _ARRAY.finditer(line.form)]
    source = lines[line.operands[0]].form
    return arrays[0] if line.opcode == "copy-start" else arrays[1], source


def _is_far(form: str) -> bool:
    """Whether an array lies in device memory: in none of the spaces that have numbers."""
    return not re.search(r"S\([1-9]\d*\)", form)


def _far_bytes(form: str) -> int:
    arrays = [match[0] for match in _ARRAY.finditer(form)]
    return sum(_bytes(array) for array in arrays if _is_far(array))


def _bytes(form: str) -> int:
    """Returns the bytes of an array with the padding of its tiles."""
    match = _ARRAY.match(form)
    if match is None:
        return 0
    sizes = [int(size) for size in match[2].split(",") if size]
    order, _, tiling = (match[3] or "").partition(":")
    minor = [int(axis) for axis in order.split(",") if axis]
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    if tile:
        for axis, size in zip(minor, reversed(tile[1].split(",")), strict=False):
            sizes[axis] = -(-sizes[axis] // int(size)) * int(size)
    return -(-prod(sizes) * element_bits(match[1]) // 8)


def element_bits(element_type: str) -> int:
    """Returns the width of f32, s8, f8e4m3fn, pred and so on."""
    digits = re.match(r"[a-z]+(\d+)", element_type)
    return int(digits[1]) if digits else 8
