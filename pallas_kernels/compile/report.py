"""What compiling a case tells, and its form as JSON."""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union

from pallasite.pallas_kernels.compile.gpu import GpuUse
from pallasite.pallas_kernels.compile.hlo import Copy
from pallasite.pallas_kernels.compile.regions import Number, Region, Work
from pallasite.pallas_kernels.compile.traffic import Instruction

Mode = Literal["compile", "analyze", "lower"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of device memory that a program needs on each device, by XLA's account.

    Attributes:
        arguments: what it is given.
        outputs: what it returns, aliased ones among them.
        temporaries: what it needs while it runs.
        aliased: outputs that take the place of donated arguments.
        code: machine code.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One Pallas call of the program.

    Attributes:
        name: `name` of the `pallas_call`, or its function's.
        instruction: what XLA calls it; unlike the name, no other kernel has it.
        vmem_bytes: of a TPU, on-chip memory that it reserves: scratch and windows of its inputs
            and outputs, with as many buffers as they have.
        gpu: of a GPU, what it takes, where that was asked for. Only Triton's kernels are known.
        root: its regions, where they were asked for.
        capacity: with them, how many instructions for each unit one bundle can hold.
    """

    name: str
    instruction: str
    vmem_bytes: int | None = None
    gpu: GpuUse | None = None
    root: Region | None = None
    capacity: dict[str, int] = field(default_factory=dict)

    @property
    def regions(self) -> tuple[Region, ...]:
        """All its regions, outer ones first; raises ValueError where they were not asked for."""
        return tuple(self._root().walk())

    def find(self, name: str) -> Region:
        """Returns the region of a path or of a Python function, see `Region.find`."""
        return self._root().find(name)

    def weighted(self, trips: Mapping[str, Number] | None = None) -> Work:
        """Returns the work of one call, see `Region.weighted`."""
        return self._root().weighted(trips)

    def use(self, work: Work) -> dict[str, float]:
        """Returns of each unit which share of its slots in these bundles is taken."""
        bundles = max(work.bundles, 1)
        return {n: work.slots.get(n, 0) / (bundles * c) for n, c in self.capacity.items()}

    def _root(self) -> Region:
        if self.root is None:
            raise ValueError(f"got no regions of {self.name}; compile for a TPU with 'analyze'")
        return self.root


@dataclass(frozen=True, kw_only=True)
class Report:
    """What compiling one case for one target has told.

    Attributes:
        function: what made the case.
        target: what it was compiled for.
        mode: how far it went.
        compile_s: seconds of XLA's and the kernels' compilers, after lowering; 0 with "lower".
        memory: None with "lower".
        copies: those that XLA has put in; none are known with "lower".
        kernels: its Pallas calls; analyzed for a GPU, those of Triton, equal ones once.
        instructions: analyzed for a TPU, what XLA runs one after another.
        versions: of JAX and of the compiler, as the interpreter that compiled has them.
    """

    function: str
    target: str
    mode: Mode
    compile_s: Number
    memory: Memory | None
    copies: tuple[Copy, ...]
    kernels: tuple[Kernel, ...]
    instructions: tuple[Instruction, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def num_copies(self, num_bytes: int) -> int:
        """Returns how many copies of at least this size there are, but for those to the chip."""
        return sum(copy.num_bytes >= num_bytes and not copy.is_on_chip for copy in self.copies)

    def kernel(self, name: str) -> Kernel:
        """Returns the kernel of this name or instruction; raises ValueError for none or several."""
        found = [kernel for kernel in self.kernels if name == kernel.instruction]
        found = found or [kernel for kernel in self.kernels if name == kernel.name]
        if len(found) == 1:
            return found[0]
        names = ", ".join(kernel.instruction for kernel in found or self.kernels)
        raise ValueError(f"got {name!r}, the name of {len(found)} kernels; there are {names}")

    def to_json(self) -> str:
        """Returns the whole report as JSON."""
        return json.dumps(_plain(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Returns the report that `to_json` has written."""
        report = _made(cls, json.loads(text))
        assert isinstance(report, cls)
        return report


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _made(form: Any, value: Any) -> Any:
    """Makes a value of the type `form` of what `_plain` returned."""
    if typing.get_origin(form) in (Union, types.UnionType):
        form = next(part for part in typing.get_args(form) if part is not type(None))
        return None if value is None else _made(form, value)
    if typing.get_origin(form) is tuple:
        return tuple(_made(typing.get_args(form)[0], item) for item in value)
    if isinstance(form, type) and is_dataclass(form):
        hints = typing.get_type_hints(form)
        return form(**{name: _made(hints[name], part) for name, part in value.items()})
    return value
