"""Figures of attention kernels, read off what a compiler has made of them: bundles and registers.

One place makes Pallasite's and JAX's, so that both are counted in the same units by the same rules.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks import kernel_cases, kernel_counts, kernel_peers
from benchmarks.kernel_cases import Shapes, plain
from benchmarks.kernel_counts import Count
from benchmarks.kernel_work import find, work
from pallasite.pallas_kernels.compile import GpuUse, Process, Report, Work, compile_for
from pallasite.pallas_kernels.paged_attention.tpu_pages import tile_rows
from pallasite.pallas_kernels.target import Target

UNIT = 2048
"""Cached tokens that decode's figures are for."""

UNEVEN = 2000
"""Cached tokens of a request whose last block is not whole."""

NUM_UNITS = 16
"""So many units are a long context."""

TILE_QUERIES, TILE_CACHED = 128, 512
"""Queries and cached tokens that prefill's figures are for."""

PROMPT = 4096
"""Tokens of a whole prompt."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a kernel is, and what compiling it took.

    Attributes:
        chip: the target's name.
        kernel: whose and which.
        cache: the cache's dtype.
        blocks: its block sizes, for a reader.
        compile_s: seconds of the compiler.
        versions: of the packages that compiled.
    """

    chip: str
    kernel: str
    cache: str
    blocks: str = ""
    compile_s: float
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DecodeFigures(Compiled):
    """Of a TPU's decode; bundles over all key heads.

    Attributes:
        request: bundles of a request of UNIT cached tokens, among others.
        uneven: bundles of a request of UNEVEN cached tokens.
        bundles: of UNIT cached tokens of a request that is NUM_UNITS times as long; all figures
            below are of these, too.
        use: shares of the units' slots.
        fills: registers read back.
        spills: registers written for want of them.
        num_dmas: copies started.
        dma_bytes: their bytes.
        clock_hz: the clock at which the bundles take as long as the device's memory takes for
            dma_bytes; at a slower one it is not memory that the kernel waits for.
        vmem_bytes: reserved on the chip.
    """

    request: float
    uneven: float
    bundles: float
    use: dict[str, float] = field(default_factory=dict)
    fills: float
    spills: float
    num_dmas: float
    dma_bytes: float
    clock_hz: float
    vmem_bytes: int


@dataclass(frozen=True, kw_only=True)
class PrefillFigures(Compiled):
    """Of a TPU's prefill, where all queries see all cached tokens.

    Attributes:
        bundles: of TILE_QUERIES queries and TILE_CACHED cached tokens over all heads.
        prompt: of a prompt of PROMPT tokens that nothing is cached of, all of it.
        use: shares of the units' slots in the innermost loop; that of the matrix unit bounds the
            share of the chip's operations that the kernel can reach.
        fills: registers read back, as `bundles`.
        spills: registers written for want of them, as `bundles`.
        vmem_bytes: reserved on the chip.
    """

    bundles: float
    prompt: float
    use: dict[str, float] = field(default_factory=dict)
    fills: float
    spills: float
    vmem_bytes: int


@dataclass(frozen=True, kw_only=True)
class WriteFigures(Compiled):
    """Of a TPU's write of several new rows of a request.

    Attributes:
        bundles: of a page of new rows over all key heads.
        vmem_bytes: reserved on the chip.
    """

    bundles: float
    vmem_bytes: int


@dataclass(frozen=True, kw_only=True)
class GpuFigures(Compiled):
    """Of a GPU's kernel."""

    use: GpuUse


Figures = DecodeFigures | PrefillFigures | WriteFigures | GpuFigures


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """Compiles cases for one chip.

    Attributes:
        target: the chip.
        shapes: of every case.
        process: which compiles.
        is_timed: whether to compile again for a compile time without what analyzing adds.
    """

    target: Target
    shapes: Shapes
    process: Process
    is_timed: bool = True

    @property
    def tile(self) -> int:
        """Rows of a page that move at once."""
        return tile_rows(self.shapes.page, self.shapes.held_as)

    def report(self, module: Any, case: str, **options: Any) -> Report:
        given = {"shapes": plain(self.shapes), **options}
        function, process = f"{module.__name__}:{case}", self.process
        report = compile_for(function, self.target, given, "analyze", process=process)
        if not self.is_timed:
            return report
        # What is analyzed is written down, too, which takes time.
        timed = compile_for(function, self.target, given, "compile", process=process)
        return replace(report, compile_s=timed.compile_s)

    def decode(self, blocks: dict[str, int] | None = None) -> DecodeFigures:
        """Returns the figures of Pallasite's; `blocks` None takes the op's own."""
        taken = blocks or plain(self.shapes.decode_blocks(self.target))
        report = self.report(kernel_cases, "tpu_decode_case", blocks=taken)

        def count(num_tokens: int) -> Count:
            pages, pieces = taken["pages"], taken["piece_pages"]
            return kernel_counts.decode(num_tokens, self.shapes.page, pages, pieces, self.tile)

        return self._decode("Pallasite", _shown(taken), report, count)

    def prefill(self, blocks: dict[str, int] | None = None) -> PrefillFigures:
        """Returns the figures of Pallasite's; `blocks` None takes the op's own."""
        taken = blocks or plain(self.shapes.prefill_blocks(self.target))
        report = self.report(kernel_cases, "tpu_prefill_case", blocks=taken)
        (kernel,) = report.kernels
        scale = self._scale(taken["tokens"], taken["pages"])
        done = work(kernel, "take_block", kernel_counts.prefill_block(scale, taken["pages"]))
        # Where all heads are taken at once there is no loop.
        is_loop = taken["heads"] < self.shapes.num_kv_heads
        place = "attend_clear/attend_heads" if is_loop else "attend_clear"
        loop = find(kernel.root, place).own
        prompt = kernel_counts.prefill_prompt(
            PROMPT, self.shapes.page, taken["tokens"], taken["pages"]
        )
        return self._prefill("Pallasite", _shown(taken), report, done, loop, prompt)

    def write(self) -> WriteFigures:
        """Returns the figures of Pallasite's."""
        report = self.report(kernel_cases, "tpu_write_case")
        (kernel,) = report.kernels
        done = work(kernel, "grid", kernel_counts.write_page(self.shapes.page, self.tile))
        return WriteFigures(
            chip=self.target.name,
            kernel="Pallasite",
            cache=self.shapes.cache,
            compile_s=report.compile_s,
            versions=report.versions,
            bundles=done.bundles,
            vmem_bytes=kernel.vmem_bytes or 0,
        )

    def ragged(self, block_pages: int, num_queries: int) -> tuple[DecodeFigures, PrefillFigures]:
        """Returns the figures of JAX's ragged_paged_attention, one kernel for both."""
        report = self.report(
            kernel_peers, "ragged_case", block_pages=block_pages, num_queries=num_queries
        )
        (kernel,) = report.kernels
        block_tokens = block_pages * self.shapes.page
        name, blocks = "JAX ragged_paged_attention", f"pages {block_pages}, tokens {num_queries}"

        def count(num_tokens: int) -> Count:
            return kernel_counts.ragged_decode(num_tokens, block_tokens, num_queries)

        decode = self._decode(name, blocks, report, count)
        body = "compute_with_kv_blk_in_cur_seq"
        prompt = kernel_counts.ragged_prompt(PROMPT, block_tokens, num_queries)
        scale = self._scale(num_queries, block_pages)
        done = work(kernel, body, kernel_counts.ragged_prefill_block(scale))
        return decode, self._prefill(
            name, blocks, report, done, find(kernel.root, body).own, prompt
        )

    def paged(self, block_pages: int) -> DecodeFigures:
        """Returns the figures of JAX's paged_attention."""
        report = self.report(kernel_peers, "paged_case", block_pages=block_pages)
        block_tokens = block_pages * self.shapes.page

        def count(num_tokens: int) -> Count:
            num_heads = self.shapes.num_kv_heads
            return kernel_counts.paged_decode(num_tokens, block_tokens, num_heads)

        return self._decode("JAX paged_attention", f"pages {block_pages}", report, count)

    def gpu(self, module: Any, case: str, names: dict[str, str]) -> list[GpuFigures]:
        """Returns the figures of a GPU case's kernels that have `names`, under what they stand for.

        A name may be the beginning of one.
        """
        report = self.report(module, case)
        figures = []
        for begin, name in names.items():
            (use,) = [k.gpu for k in report.kernels if k.name.startswith(begin) and k.gpu]
            figures.append(
                GpuFigures(
                    chip=self.target.name,
                    kernel=name,
                    cache=self.shapes.cache,
                    compile_s=report.compile_s,
                    versions=report.versions,
                    use=use,
                )
            )
        return figures

    def _decode(self, name: str, blocks: str, report: Report, count: Any) -> DecodeFigures:
        (kernel,) = report.kernels
        long = work(kernel, "grid", count(UNIT * NUM_UNITS)).scaled(1 / NUM_UNITS)
        return DecodeFigures(
            chip=self.target.name,
            kernel=name,
            cache=self.shapes.cache,
            blocks=blocks,
            compile_s=report.compile_s,
            versions=report.versions,
            request=work(kernel, "grid", count(UNIT)).bundles,
            uneven=work(kernel, "grid", count(UNEVEN)).bundles,
            bundles=long.bundles,
            use=kernel.use(long),
            fills=long.fills,
            spills=long.spills,
            num_dmas=long.num_dmas,
            dma_bytes=long.dma_bytes,
            clock_hz=long.bundles * (self.target.hbm_bytes_per_s or 0) / long.dma_bytes,
            vmem_bytes=kernel.vmem_bytes or 0,
        )

    def _prefill(
        self, name: str, blocks: str, report: Report, done: Work, loop: Work, prompt: Count
    ) -> PrefillFigures:
        (kernel,) = report.kernels
        return PrefillFigures(
            chip=self.target.name,
            kernel=name,
            cache=self.shapes.cache,
            blocks=blocks,
            compile_s=report.compile_s,
            versions=report.versions,
            bundles=done.bundles,
            prompt=work(kernel, "grid", prompt).bundles,
            use=kernel.use(loop),
            fills=done.fills,
            spills=done.spills,
            vmem_bytes=kernel.vmem_bytes or 0,
        )

    def _scale(self, num_queries: int, block_pages: int) -> float:
        """How many blocks of so many queries are as much as prefill's figures are for."""
        block_tokens = block_pages * self.shapes.page
        return TILE_QUERIES / num_queries * TILE_CACHED / block_tokens


def _shown(blocks: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in blocks.items())
