"""How long products with quantized matrices take on the device that is there, and XLA's own."""

import statistics
from collections.abc import Iterator

import jax

from benchmarks import quantized
from benchmarks.kernel_page import Table
from benchmarks.options import say
from benchmarks.timing import Times, random_arguments, seconds
from pallasite.pallas_kernels.target import Target

FORMS = ("int8", "w8a8", "int4:32")
TOKENS = (1, 16, 64)
SHAPE = "14336x4096"
NUM_STEPS = 10


def quantized_products(target: Target) -> Iterator[Times]:
    """Times products with the matrices of a stack of layers: the op, and XLA's dot for it."""
    for form in FORMS:
        for num_tokens in TOKENS:
            for body in quantized.BODIES:
                case = quantized.layers(target, form, SHAPE, num_tokens, body)
                x, matrix = random_arguments(case)
                say(f"{body}: {form}, {num_tokens} tokens")
                times = seconds(lambda _, x, m, f=case.function: f(x, m), x, matrix, NUM_STEPS)
                stored = sum(leaf.nbytes for leaf in jax.tree.leaves(matrix))
                num_rows, num_inputs = map(int, SHAPE.split("x"))
                yield Times(
                    kernel="XLA" if body == "xla" else "Pallasite",
                    load=f"{num_tokens} token{'s' * (num_tokens > 1)}",
                    cache=form,
                    median_s=statistics.median(times) / quantized.NUM_LAYERS,
                    least_s=min(times) / quantized.NUM_LAYERS,
                    num_bytes=stored // quantized.NUM_LAYERS,
                    flops=2 * num_tokens * num_rows * num_inputs,
                )


def product_table(found: list[Times]) -> Table:
    """Returns microseconds of a layer's product, the op's beside XLA's."""
    rows = []
    for xla, op in zip(found[::2], found[1::2], strict=True):
        times = xla.median_s * 1e6, op.median_s * 1e6
        speed = round(op.num_bytes / op.median_s / 1e9)
        rows.append((op.cache, op.load, *times, f"{xla.median_s / op.median_s:.2f}", speed))
    headers = "form", "step", "XLA, µs", "Pallasite, µs", "times as fast", "GB/s stored"
    title = f"a product with a matrix of {SHAPE}"
    return Table(name="products", title=title, headers=headers, rows=tuple(rows))
