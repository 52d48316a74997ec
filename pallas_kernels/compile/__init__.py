"""Compiles a function for a device that is not there, and tells what it needs.

A module of yours says what to compile:

    def case(target, num_rows):
        x = jax.ShapeDtypeStruct((num_rows, 128), jnp.float32)
        return Case(my_function, (x,))

Another process imports it, compiles the case and reports:

    report = compile_for("my.module:case", "tpu:v6e", {"num_rows": 64}, "analyze")
    report.memory.temporaries, report.num_copies(2**20)
    kernel = report.kernel("my_kernel")
    work = kernel.weighted({"loop_body": 12, "last_step": 1 / 12})
    work.bundles, work.fills, kernel.use(work)["MXU"]

So does `python -m pallasite.pallas_kernels.compile my.module:case --target tpu:v6e --option
num_rows=64 --analyze`. Figures are "static", read off the compiler: bundles are cycles without any
stall, a lower bound. XLA may move small arguments to memory on the chip before a kernel, so give a
case the sizes that it will have.
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
