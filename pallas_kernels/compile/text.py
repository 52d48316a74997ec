"""A report as text for a person."""

from collections.abc import Iterator

from pallasite.pallas_kernels.compile.regions import Region
from pallasite.pallas_kernels.compile.report import Kernel, Report

_UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU")


def readable(report: Report) -> str:
    """Returns the report as lines of text, with a table of each kernel's regions."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    done = "lowered" if report.mode == "lower" else f"compiled in {report.compile_s:.2f} s"
    yield f"{report.function} for {report.target}: {done}"
    if report.memory is not None:
        memory = report.memory
        yield (
            f"memory: arguments {_bytes(memory.arguments)}, outputs {_bytes(memory.outputs)}"
            f" ({_bytes(memory.aliased)} of them aliased), temporaries"
            f" {_bytes(memory.temporaries)}, code {_bytes(memory.code)}"
        )
        to_chip = [copy.num_bytes for copy in report.copies if copy.is_on_chip]
        others = [copy.num_bytes for copy in report.copies if not copy.is_on_chip]
        yield (
            f"copies by XLA: {len(others)} of {_bytes(sum(others))}, and {len(to_chip)} of"
            f" {_bytes(sum(to_chip))} to memory on the chip"
        )
    for kernel in report.kernels:
        yield ""
        yield from _kernel_lines(kernel)


def _kernel_lines(kernel: Kernel) -> Iterator[str]:
    title = f"kernel {kernel.name} ({kernel.instruction})"
    if kernel.vmem_bytes is not None:
        title += f": {_bytes(kernel.vmem_bytes)} of VMEM"
    if kernel.gpu is not None:
        gpu = kernel.gpu
        title += (
            f": {gpu.registers} registers, {gpu.spill_stores} bytes of spill stores and"
            f" {gpu.spill_loads} of spill loads in each of {gpu.threads} threads,"
            f" {_bytes(gpu.shared_bytes)} of shared memory"
        )
    yield title
    if kernel.root is None:
        return
    rows = [["region", "times", "bundles", *_UNITS, "fills", "spills", "DMAs"]]
    rows += [_row(kernel, region) for region in kernel.root.walk()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield f"  {first.ljust(widths[0])}  {'  '.join(cells)}"
    yield (
        "  Each row is one pass without the rows below it that lie in it. Units are shares of their"
        " slots. Stalls are not counted."
    )
    try:
        total = kernel.weighted()
    except ValueError as error:
        yield f"  In all: {error}"
    else:
        yield f"  In all: {total.bundles:,.0f} bundles, {total.num_dmas:,.0f} DMAs"


def _row(kernel: Kernel, region: Region) -> list[str]:
    work, use = region.own, kernel.use(region.own)
    times = "1"
    if region.kind == "loop":
        times = "?" if region.trips is None else f"{region.trips:,}"
    elif region.kind == "branch":
        times = "0-1" if region.share is None else f"{region.share:.3g}"
    name = region.name
    if name in ("if", "loop") and region.functions:
        # What the compiler made of itself is known by what it holds.
        name += f" ({max(region.functions, key=lambda f: region.functions[f])})"
    return [
        "  " * region.depth + name,
        times,
        f"{work.bundles:,}",
        *(f"{use[unit]:.0%}" for unit in _UNITS),
        f"{work.fills:,}",
        f"{work.spills:,}",
        f"{work.num_dmas:,}",
    ]


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
