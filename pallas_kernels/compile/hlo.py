"""What the text of a compiled program tells: its copies, and its kernels with their memory."""

import re
from dataclasses import dataclass
from math import prod

from pallasite.pallas_kernels.compile.traffic import element_bits

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COPY = re.compile(r"%?([\w.-]+) = (.*?) copy(?:-start)?\(")
_KERNEL = re.compile(r"%?([\w.-]+) = .*? custom-call\(.*?custom_call_target=\"([\w$.]+)\"")
_FORM = re.compile(r" +(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ")
_SCOPED = re.compile(r'"used_scoped_memory_configs":\[([^\]]*)\]')
_VMEM = re.compile(r'"memory_space":"1","offset":"\d+","size":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A copy that XLA has put into the program.

    Attributes:
        name: the instruction's.
        num_bytes: of the copied array, without the padding of its layout.
        is_on_chip: whether it goes to memory on the chip, as prefetches do.
    """

    name: str
    num_bytes: int
    is_on_chip: bool


def copies(text: str) -> tuple[Copy, ...]:
    """Returns the copies of a program in its order, asynchronous ones too."""
    found = []
    for line in _instructions(text):
        if (match := _COPY.search(line)) and (array := _ARRAY.search(match[2])):
            sizes = [int(size) for size in array[2].split(",") if size]
            num_bytes = -(-prod(sizes) * element_bits(array[1]) // 8)
            is_on_chip = bool(re.search(r"S\([1-9]\)", array[3] or ""))
            found.append(Copy(name=match[1], num_bytes=num_bytes, is_on_chip=is_on_chip))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class TpuCall:
    """A Pallas call in a program for a TPU.

    Attributes:
        name: what the program calls the kernel, `name` of its `pallas_call`.
        instruction: what XLA calls it.
        vmem_bytes: what it reserves.
        code: the kernel and where its operands and results lie; XLA compiles equal ones once.
    """

    name: str
    instruction: str
    vmem_bytes: int
    code: str


def tpu_calls(text: str) -> list[TpuCall]:
    """Returns the Pallas calls of a program in its order."""
    lines = _instructions(text)
    forms = {match[1]: match[2] for line in lines if (match := _FORM.match(line))}
    found = []
    for line in lines:
        if (match := _KERNEL.search(line)) and match[2] == "tpu_custom_call":
            scoped = _SCOPED.search(line)
            sizes = [int(size) for size in _VMEM.findall(scoped[1])] if scoped else []
            called = line.partition(" custom-call(")[2].partition(")")[0]
            body = re.search(r'"body":"([^"]*)"', line)
            parts = [forms.get(name) for name in (match[1], *re.findall(r"%([\w.-]+)", called))]
            found.append(
                TpuCall(
                    name=kernel_name(line, match[1]),
                    instruction=match[1],
                    vmem_bytes=sum(sizes),
                    code=f"{parts} {body and body[1]}",
                )
            )
    return found


def _instructions(text: str) -> list[str]:
    """Returns a program's instructions; metadata of some have lines of their own."""
    return re.split(r"^(?= +(?:ROOT )?%[\w.-]+ = )", text, flags=re.M)[1:]


def kernel_name(line: str, instruction: str) -> str:
    """Returns what the program calls the kernel, `name` of its `pallas_call`."""
    op_name = _OP_NAME.search(line)
    parts = op_name[1].split("/") if op_name else []
    if len(parts) > 1 and parts[-1] == "pallas_call" and "(" not in parts[-2]:
        return parts[-2]
    return re.sub(r"\.\d+$", "", instruction)
