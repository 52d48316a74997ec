"""Compiles the GPU's kernels for chips that are not there, and checks their registers.

    python -m tests.pallas_kernels.gpu_registers build/cuda/venv/bin/python

The interpreter that is named has the GPU's compiler, see `make compile-gpu`. Prints a table and
exits with 1 where a kernel is over its limit.
"""

import itertools
import sys
from pathlib import Path

from pallasite.pallas_kernels.compile import GpuUse, Process, Report, compile_for
from pallasite.pallas_kernels.target import find_target
from tests.pallas_kernels import attention_programs

CHIPS = ("gpu:h100", "gpu:h200", "gpu:b200")
HELD_AS = ("float32", "bfloat16", "int8", "float8_e4m3fn")
WIDTHS = (64, 128, 256)
KERNELS = ("write", "decode", "merge", "prefill")


def main(python: str) -> None:
    print("| chip | cache | H | variant | kernel | registers | spilled bytes | shared | threads |")
    print("|---|---|---|---|---|---|---|---|---|")
    failures = []
    for chip, held_as, head_width, variant in itertools.product(
        CHIPS, HELD_AS, WIDTHS, ("plain", "all")
    ):
        options = {"held_as": held_as, "head_width": head_width, "variant": variant}
        report = compiled(chip, options, python)
        for name in KERNELS:
            use = report.kernel(f"paged_attention_{name}").gpu
            assert use is not None
            print(
                f"| {chip} | {held_as} | {head_width} | {variant} | {name} | {use.registers} |"
                f" {use.spill_stores} | {use.shared_bytes} | {use.threads} |",
                flush=True,
            )
        failures += [f"{chip} {options}: {fault}" for fault in faults(chip, options, report)]
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(1 if failures else 0)


def compiled(chip: str, options: dict[str, object], python: str = sys.executable) -> Report:
    """Returns the report of `attention_programs.step` with these options."""
    return compile_for(
        f"{attention_programs.__name__}:step",
        chip,
        options,
        "analyze",
        process=Process(python=str(Path(python).absolute())),
    )


def faults(chip: str, options: dict[str, object], report: Report) -> list[str]:
    """Returns what is wrong with a report: registers, spills, copies of the cache."""
    found = []
    for name in KERNELS:
        use = report.kernel(f"paged_attention_{name}").gpu
        assert use is not None
        limit = register_limit(name, options)
        if use.registers > limit:
            found.append(f"{name} takes {use.registers} registers; it may take {limit}")
        if use.spill_stores > spill_limit(name, options):
            found.append(f"{name} spills {use.spill_stores} bytes")
        found += shared_faults(name, chip, use)
    case = attention_programs.step(find_target(chip), **options)  # type: ignore[arg-type]
    assert report.memory is not None
    if report.memory.aliased != attention_programs.cache_bytes(case):
        found.append(f"{report.memory.aliased} bytes are updated in place")
    if report.num_copies(2**20):
        found.append(f"{report.num_copies(2**20)} copies of 1 MiB or more")
    return found


def register_limit(name: str, options: dict[str, object]) -> int:
    """With 96 registers a multiprocessor holds five of the decode's blocks at once, with 128 four.

    Wide heads take more, and so do those of f32, which no matrix unit multiplies.
    """
    if name == "prefill" or options["head_width"] == 256:
        return 255
    return 96 if options["held_as"] == "bfloat16" else 128


def spill_limit(name: str, options: dict[str, object]) -> int:
    """Bytes: few, beside the tile that a prefill of wide or f32 heads holds in registers."""
    is_wide = options["head_width"] == 256 and options["held_as"] != "bfloat16"
    return 160 if name == "prefill" and (is_wide or options["held_as"] == "float32") else 0


def shared_faults(name: str, chip: str, use: GpuUse) -> list[str]:
    """A block has 1 KiB less than its multiprocessor."""
    room = (find_target(chip).vmem_bytes or 0) - 1024
    if use.shared_bytes <= room:
        return []
    return [f"{name} takes {use.shared_bytes} bytes of shared memory; there are {room}"]


if __name__ == "__main__":
    main(sys.argv[1])
