"""Compiles the GPU's kernels for chips that are not there, and checks what they take.

    python -m tests.pallas_kernels.gpu_registers build/cuda/venv/bin/python

The interpreter that is named has the GPU's compiler, see `make compile-gpu`. Prints a table and
exits with 1 where a program is over its limits.
"""

import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pallasite.pallas_kernels.compile import Process, Report, compile_for
from pallasite.pallas_kernels.target import find_target
from tests.pallas_kernels import attention_programs, quantized_programs

CHIPS = ("gpu:h100", "gpu:h200", "gpu:b200")
HELD_AS = ("float32", "bfloat16", "int8", "float8_e4m3fn")
WIDTHS = (64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a kernel may take: registers of a thread, and bytes that it spills."""

    registers: int
    spills: int = 0


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program to compile, and the limits of its kernels.

    Attributes:
        function: makes its case.
        in_place: bytes that it updates in place.
    """

    chip: str
    function: str
    options: Mapping[str, Any]
    limits: Mapping[str, Limit]
    in_place: int = 0

    def __str__(self) -> str:
        return " ".join([self.chip, *(f"{name}={value}" for name, value in self.options.items())])

    def compile(self, python: str = sys.executable) -> Report:
        process = Process(python=str(Path(python).absolute()))
        return compile_for(self.function, self.chip, dict(self.options), "analyze", process=process)

    def faults(self, report: Report) -> list[str]:
        """Returns what is wrong with its report."""
        # A block has 1 KiB less than its multiprocessor.
        room = (find_target(self.chip).vmem_bytes or 0) - 1024
        found = []
        for name, limit in self.limits.items():
            use = report.kernel(name).gpu
            assert use is not None
            if use.registers > limit.registers:
                found.append(f"{name}: {use.registers} registers, above {limit.registers}")
            if max(use.spill_stores, use.spill_loads) > limit.spills:
                found.append(f"{name}: {use.spill_stores} bytes spilled, above {limit.spills}")
            if use.shared_bytes > room:
                found.append(f"{name}: {use.shared_bytes} bytes of shared memory, above {room}")
        assert report.memory is not None
        if report.memory.aliased != self.in_place:
            found.append(f"{report.memory.aliased} bytes in place, not {self.in_place}")
        if report.num_copies(2**20):
            found.append(f"{report.num_copies(2**20)} copies of 1 MiB or more")
        return found


def attention(chip: str) -> Iterator[Program]:
    for held_as, width, variant in itertools.product(HELD_AS, WIDTHS, ("plain", "all")):
        options = {"held_as": held_as, "head_width": width, "variant": variant}
        case = attention_programs.step(find_target(chip), **options)  # type: ignore[arg-type]
        yield Program(
            chip=chip,
            function=f"{attention_programs.__name__}:step",
            options=options,
            limits=dict(_attention_limits(held_as, width)),
            in_place=attention_programs.cache_bytes(case),
        )


def _attention_limits(held_as: str, width: int) -> Iterator[tuple[str, Limit]]:
    """With 96 registers a multiprocessor holds five blocks of the decode at once, with 128 four.

    That of int8 has half the threads. Wide heads take more, and so do those of f32, which no matrix
    unit multiplies. The prefill holds as much as a block can; those two and wide heads of 8 bits
    spill a little of it.
    """
    small = Limit(registers=64)
    yield "paged_attention_write", small
    yield "paged_attention_merge", small
    decode = 255 if width == 256 else {"bfloat16": 96, "int8": 168}.get(held_as, 128)
    yield "paged_attention_decode", Limit(registers=decode)
    spills = held_as == "float32" or (width == 256 and held_as != "bfloat16")
    yield "paged_attention_prefill", Limit(registers=255, spills=160 if spills else 0)


def products(chip: str) -> Iterator[Program]:
    kinds = [(kind, None) for kind in ("bf16", "fp8", "int8", "w8a8")]
    kinds += [("int4", 32), ("int4", 128), ("int8", 128), ("w8a8", 128)]
    for (kind, group), num_tokens in itertools.product(kinds, (16, 256)):
        yield Program(
            chip=chip,
            function=f"{quantized_programs.__name__}:layers",
            options={"kind": kind, "group": group, "num_tokens": num_tokens},
            limits={"quantized_matmul": Limit(registers=128 if num_tokens == 16 else 255)},
        )


def main(python: str) -> None:
    print("| program | kernel | registers | spilled bytes | shared bytes | threads |")
    print("|---|---|---|---|---|---|")
    failures = []
    for program in itertools.chain(*((*attention(chip), *products(chip)) for chip in CHIPS)):
        report = program.compile(python)
        for name in program.limits:
            use = report.kernel(name).gpu
            assert use is not None
            print(
                f"| {program} | {name} | {use.registers} | {use.spill_stores} |"
                f" {use.shared_bytes} | {use.threads} |",
                flush=True,
            )
        failures += [f"{program}: {fault}" for fault in program.faults(report)]
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1])
