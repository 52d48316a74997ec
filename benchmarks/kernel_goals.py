"""What Pallasite's kernels shall keep to on Llama 3 8B's heads, and whether they do."""

from collections.abc import Iterator, Sequence

from benchmarks.kernel_figures import UNIT, DecodeFigures, Figures, GpuFigures, PrefillFigures

DECODE_BUNDLES = {
    ("tpu:v5e", 2): 3200,
    ("tpu:v6e", 2): 2900,
    ("tpu:v7x", 2): 2800,
    ("tpu:v6e", 1): 2600,
    ("tpu:v7x", 1): 2200,
}
"""Bundles of a request of UNIT cached tokens at most, by chip and bytes of a cached value."""

DECODE_SPILLS = 50
DECODE_COMPILE_S = 5
PREFILL_MXU = {"tpu:v5e": 0.85, "tpu:v6e": 0.70, "tpu:v7x": 0.70}
PREFILL_COMPILE_S = 20
GPU_REGISTERS = {"decode": 96, "prefill": 255}

Verdict = tuple[str, str, str, str, str]


def verdicts(figures: Sequence[Figures]) -> Iterator[Verdict]:
    """Yields chip, figure, goal, what it is, and "kept" or "missed"."""
    for one in figures:
        if not one.kernel.startswith("Pallasite"):
            continue
        if isinstance(one, DecodeFigures):
            yield from _decode(one)
        elif isinstance(one, PrefillFigures):
            yield from _prefill(one)
        elif isinstance(one, GpuFigures):
            yield from _gpu(one)


def _decode(one: DecodeFigures) -> Iterator[Verdict]:
    name = f"decode, {one.cache}: "
    goal = DECODE_BUNDLES.get((one.chip, 2 if one.cache == "bfloat16" else 1))
    if goal is not None:
        yield _most(one, f"{name}bundles of {UNIT:,} tokens", goal, one.request)
    yield _most(one, f"{name}spills per {UNIT:,} tokens", DECODE_SPILLS, one.spills)
    yield _most(one, f"{name}compile, s", DECODE_COMPILE_S, one.compile_s)


def _prefill(one: PrefillFigures) -> Iterator[Verdict]:
    name = f"prefill, {one.cache}: "
    goal = PREFILL_MXU.get(one.chip)
    if goal is not None:
        used = one.use["MXU"]
        is_kept = "kept" if used >= goal else "missed"
        yield one.chip, f"{name}matrix unit in use", f">= {goal:.0%}", f"{used:.1%}", is_kept
    yield _most(one, f"{name}compile, s", PREFILL_COMPILE_S, one.compile_s)


def _gpu(one: GpuFigures) -> Iterator[Verdict]:
    kernel = one.kernel.removeprefix("Pallasite ")
    name = f"{kernel}, {one.cache}: "
    if kernel in GPU_REGISTERS:
        yield _most(one, f"{name}registers", GPU_REGISTERS[kernel], one.use.registers)
        yield _most(one, f"{name}bytes spilled", 0, one.use.spill_stores)


def _most(one: Figures, name: str, goal: int, figure: float) -> Verdict:
    text = f"{figure:,.1f}" if figure < 100 and figure != round(figure) else f"{figure:,.0f}"
    return one.chip, name, f"<= {goal:,}", text, "kept" if figure <= goal else "missed"
