"""Compiles a function for a device that is not there, and tells what it needs.

    report = compile_for("my.module:case", "tpu:v6e", {"num_rows": 64}, "analyze")
    report.memory.temporaries, report.num_copies(2**20)
    kernel = report.kernel("my_kernel")
    work = kernel.weighted({"body": 12, "last": 1 / 12})

where `case(target, num_rows)` in `my.module` returns a `Case`. Figures of kernels count what the
compiler has made, "static" figures: bundles are cycles without any stall, so a lower bound.
"""

from pallasite.pallas_kernels.compile.case import Case
from pallasite.pallas_kernels.compile.errors import CompileError, MissingCompilerError
from pallasite.pallas_kernels.compile.gpu import GpuUse
from pallasite.pallas_kernels.compile.hlo import Copy
from pallasite.pallas_kernels.compile.process import Process, compile_for
from pallasite.pallas_kernels.compile.regions import Dma, Region, Work
from pallasite.pallas_kernels.compile.report import Kernel, Memory, Report

__all__ = [
    "Case",
    "CompileError",
    "Copy",
    "Dma",
    "GpuUse",
    "Kernel",
    "Memory",
    "MissingCompilerError",
    "Process",
    "Region",
    "Report",
    "Work",
    "compile_for",
]
