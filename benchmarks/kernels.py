"""What the compilers make of the attention kernels, beside those that come with JAX. Static.

No device is asked: kernels are compiled for chips that are not there, and what the compiler has
made is counted. Bundles are cycles without any stall, a lower bound.
"""

import argparse
import dataclasses
import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import kernel_cases, kernel_peers, kernel_tune, report
from benchmarks.kernel_cases import Shapes
from benchmarks.kernel_figures import Compiler, Figures
from benchmarks.kernel_goals import verdicts
from benchmarks.kernel_page import Table, draw, fill_in, tables
from benchmarks.kernel_work import UnknownRegionsError
from benchmarks.options import run, say
from pallasite.models.errors import ConfigError
from pallasite.pallas_kernels.compile import CompileError, Process
from pallasite.pallas_kernels.paged_attention.block_table import Entry
from pallasite.pallas_kernels.target import Target, find_target
from pallasite.server.arguments import Parser
from pallasite.server.flags import FILE, WHOLE

RAGGED_BLOCKS = (8, 32)
"""Pages and queries of a block of JAX's ragged_paged_attention, by its own table of sizes."""

RAGGED_DECODE_BLOCKS = (8, 2)
"""Sizes that suit it better where each request has one query."""

GPU_KERNELS = {
    "gpu_decode_case": ("decode", "merge"),
    "gpu_prefill_case": ("prefill",),
    "gpu_write_case": ("write",),
}
"""Kernels of each case of Pallasite's for GPUs."""


def main() -> None:
    """Compiles and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    if args.plot is not None:
        report.check_plot()
    targets = [_target(name) for name in args.target]
    try:
        if args.tune:
            _tune(targets, args)
        else:
            _show(targets, args)
    except (CompileError, UnknownRegionsError) as error:
        raise ConfigError(str(error)) from error


def _show(targets: list[Target], args: argparse.Namespace) -> None:
    figures: list[Figures] = []
    # GPUs first: their compiler may be missing, and the TPU's kernels take long.
    for target in sorted(targets, key=lambda target: target.platform):
        figures += _figures(target, args)
    made = [*tables(figures), _goals(figures)]
    for table in made:
        print(report.table(f"{table.title} (static)", table.headers, table.rows), end="\n\n")
    print(
        "Static: read off the compiler, stalls not included. Only Pallasite's decode writes the"
        " cache, too.\nGHz: the clock below which it is not memory that decode waits for. Compile"
        " times are this machine's."
    )
    if args.output is not None:
        report.write_json(args.output, _result(figures, args))
    if args.document is not None:
        fill_in(args.document, made)
    if args.plot is not None:
        draw(args.plot, figures)


def _tune(targets: list[Target], args: argparse.Namespace) -> None:
    entries: list[Entry] = []
    for target in targets:
        if target.platform != "tpu":
            raise ConfigError(f"got --tune for {target.name}; the table is of TPUs; name one")
        for cache in ("bfloat16", _cache_of_8_bits(target)):
            compiler = replace(_with_cache(_compiler(target, args), cache), is_timed=False)
            tried, best = kernel_tune.tune(compiler)
            print(report.table(f"{tried.title} (static)", tried.headers, tried.rows), end="\n\n")
            entries += best
            # What was found stays, whatever becomes of the next.
            kernel_tune.write(entries)


def _figures(target: Target, args: argparse.Namespace) -> Iterator[Figures]:
    make = {"tpu": _tpu_figures, "gpu": _gpu_figures}[target.platform]
    yield from make(_compiler(target, args), args.against == "jax")


def _compiler(target: Target, args: argparse.Namespace) -> Compiler:
    shapes = Shapes(
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_width=args.head_width,
        page=args.page_size or target.page_size,
    )
    python = args.gpu_python if target.platform == "gpu" else sys.executable
    process = Process(python=str(Path(python).absolute()))
    return Compiler(target=target, shapes=shapes, process=process)


def _tpu_figures(compiler: Compiler, has_peers: bool) -> Iterator[Figures]:
    for cache in ("bfloat16", _cache_of_8_bits(compiler.target)):
        held = _with_cache(compiler, cache)
        yield _said(held.decode())
        yield _said(held.prefill())
        yield _said(held.write())
        if not has_peers:
            continue
        decode, prefill = held.ragged(*RAGGED_BLOCKS)
        yield _said(decode)
        yield prefill
        yield _said(held.ragged(*RAGGED_DECODE_BLOCKS)[0])
    if has_peers:
        # Its only form of 8 bits is int8.
        for cache in ("bfloat16", "int8"):
            held = _with_cache(compiler, cache)
            yield _said(held.paged(max(2048 // compiler.shapes.page, 1)))


def _gpu_figures(compiler: Compiler, has_peers: bool) -> Iterator[Figures]:
    for cache in ("bfloat16", "int8", "float8_e4m3fn"):
        held = _with_cache(compiler, cache)
        for case, names in GPU_KERNELS.items():
            named = {f"paged_attention_{name}": f"Pallasite {name}" for name in names}
            yield from map(_said, held.gpu(kernel_cases, case, named))
    if has_peers:
        for cache in ("bfloat16", "int8"):
            held = _with_cache(compiler, cache)
            paged = {"paged_attention": "JAX paged_attention"}
            yield from map(_said, held.gpu(kernel_peers, "gpu_paged_case", paged))
        whole = {"mha_forward": "JAX mha"}
        yield from map(_said, compiler.gpu(kernel_peers, "gpu_mha_case", whole))


def _with_cache(compiler: Compiler, cache: str) -> Compiler:
    return replace(compiler, shapes=replace(compiler.shapes, cache=cache))


def _cache_of_8_bits(target: Target) -> str:
    return "int8" if target.multiplies_int8 else "float8_e4m3fn"


def _said(figures: Any) -> Any:
    say(f"{figures.chip}: {figures.kernel} with {figures.cache}, {figures.compile_s:.1f} s")
    return figures


def _goals(figures: list[Figures]) -> Table:
    return Table(
        name="goals",
        title="goals of Pallasite's",
        headers=("chip", "figure", "goal", "static", ""),
        rows=tuple(verdicts(figures)),
    )


def _result(figures: list[Figures], args: argparse.Namespace) -> dict[str, Any]:
    kinds: dict[str, list[Any]] = {}
    versions: dict[str, dict[str, str]] = {}
    for one in figures:
        values = dataclasses.asdict(one)
        # A chip's are all made by one interpreter, which need not be this one.
        versions[one.chip] = values.pop("versions")
        kinds.setdefault(type(one).__name__, []).append(values)
    return {
        "made": "static",
        "shapes": {name: getattr(args, name) for name in ("heads", "kv_heads", "head_width")},
        "versions": {"pallasite": importlib.metadata.version("pallasite"), **versions},
        "figures": kinds,
    }


def _target(name: str) -> Target:
    try:
        target = find_target(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not target.topology:
        raise ConfigError(f"got --target {name}, which is no one chip; name one, such as tpu:v6e")
    return target


def _arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.kernels", description="Static figures of kernels.")
    parser.add_argument(
        "--target", action="append", required=True, metavar="CHIP", help="such as tpu:v6e; repeat"
    )
    parser.add_argument("--against", choices=("jax",), help="compile JAX's kernels, too")
    for flag, default, text in (
        ("--heads", Shapes.num_heads, "query heads"),
        ("--kv-heads", Shapes.num_kv_heads, "key heads"),
        ("--head-width", Shapes.head_width, "width of a head"),
    ):
        text = f"{text} (default: {default})"
        parser.add_argument(flag, type=WHOLE, default=default, metavar="N", help=text)
    parser.add_argument(
        "--page-size", type=WHOLE, metavar="N", help="tokens of a page (default: the chip's)"
    )
    parser.add_argument(
        "--gpu-python",
        default=sys.executable,
        metavar="FILE",
        help="an interpreter that has the GPU's compiler (default: this one)",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="try block sizes, and write the best into paged_attention/block_table.py",
    )
    parser.add_argument("--plot", type=FILE, metavar="FILE", help="draw the figures as a PNG")
    parser.add_argument("--document", type=FILE, metavar="FILE", help="a page to fill in")
    parser.add_argument("--output", type=FILE, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
