"""How long the kernels take on the device that is there; on a GPU beside JAX's. Measured.

    python -m benchmarks.kernel_times --document docs/kernels.md

The attention op is timed as a model calls it, its write of the cache included, in a loop in which
each step takes the last one's result. How fast the device copies memory and multiplies large
matrices is measured in the same run. On a CPU nobody would time the op; it runs there in tests.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import kernel_peers, report
from benchmarks.kernel_cases import Shapes
from benchmarks.kernel_page import Table, check_page, fill_in
from benchmarks.kernel_products import product_table, quantized_products
from benchmarks.options import run, say
from benchmarks.timing import Times, random_arguments, seconds
from pallasite.engine.deployment import target_for
from pallasite.models.errors import ConfigError
from pallasite.pallas_kernels.paged_attention import (
    AttentionConfig,
    PagedCache,
    Ragged,
    paged_attention,
)
from pallasite.pallas_kernels.target import CPU, Target
from pallasite.server.arguments import Parser
from pallasite.server.flags import FILE

RUN_S = 2e-2
"""What a run should take on a fast device, so that the host's part counts little."""

CACHES = ("bfloat16", "int8", "float8_e4m3fn")
NUM_LAYERS = 2
"""Of the cache, taken in turn, as a model takes its own."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """A step's requests.

    Attributes:
        name: in the table.
        decode: cached tokens of each request with one query, that one included.
        prefill: queries and cached tokens, they included, of each other request.
    """

    name: str
    decode: tuple[int, ...] = ()
    prefill: tuple[tuple[int, int], ...] = ()

    @property
    def requests(self) -> tuple[tuple[int, int], ...]:
        return *((1, length) for length in self.decode), *self.prefill

    @property
    def num_tokens(self) -> int:
        return sum(new for new, _ in self.requests)

    @property
    def is_prompt(self) -> bool:
        """Whether it is one request, all new."""
        return [new == length for new, length in self.requests] == [True] and not self.decode

    def num_scores(self) -> int:
        """Returns how many keys all queries of a head see together."""
        return sum(new * length - new * (new - 1) // 2 for new, length in self.requests)

    def num_bytes(self, shapes: Shapes) -> int:
        """Returns what attention must move: cached rows once, new ones, queries and results."""
        row = 2 * shapes.num_kv_heads * shapes.head_width * shapes.held_as.itemsize
        if shapes.held_as.itemsize == 1:
            row += 2 * shapes.num_kv_heads * 4
        given = shapes.head_width * (2 * shapes.num_kv_heads + shapes.num_heads) * 2
        results = shapes.head_width * shapes.num_heads * 4
        read = sum(length for _, length in self.requests)
        return (read + self.num_tokens) * row + self.num_tokens * (given + results)


LOADS = (
    Load(name="64 requests of 2,048", decode=(2048,) * 64),
    Load(name="64 requests of 128 to 8,192", decode=tuple(range(128, 8193, 128))),
    Load(name="8 requests of 2,048", decode=(2048,) * 8),
    Load(name="1 request of 32,768", decode=(32768,)),
    Load(name="a prompt of 4,096", prefill=((4096, 4096),)),
    Load(name="512 new tokens of 8,192", prefill=((512, 8192),)),
    Load(
        name="32 requests of 2,048, 512 new of 4,096", decode=(2048,) * 32, prefill=((512, 4096),)
    ),
)


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A kernel that did not run, and why."""

    kernel: str
    load: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What the device reached: bytes a second of a copy, both ways counted, and bfloat16 FLOP/s."""

    bytes_per_s: float
    flops: float


def main() -> None:
    """Measures and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    device = jax.devices()[0]
    target = target_for(device)
    if target.platform == "cpu":
        raise ConfigError("got a CPU; kernels are timed on an accelerator; run this where one is")
    if args.document is not None:
        check_page(args.document, ("device", "attention", "products"))
    most = measured_speeds(2**30, 8192)
    found = list(attention(target, Shapes(page=target.page_size), LOADS))
    products = list(quantized_products(target))
    made = [attention_table(found, most), product_table(products)]
    print(
        f"{device.device_kind}, jax {jax.__version__}: a copy moves {most.bytes_per_s / 1e9:,.0f}"
        f" GB/s, a product of matrices does {most.flops / 1e12:,.0f} TFLOP/s"
    )
    for table in made:
        print(report.table(f"{table.title} (measured)", table.headers, table.rows), end="\n\n")
    if args.output is not None:
        result = {
            "made": "measured",
            "device": device.device_kind,
            "jax": jax.__version__,
            "speeds": asdict(most),
            "attention": [asdict(one) for one in found if isinstance(one, Times)],
            "missing": [asdict(one) for one in found if isinstance(one, Missing)],
            "products": [asdict(one) for one in products],
        }
        report.write_json(args.output, result)
    if args.document is not None:
        where = device_table(device.device_kind, target, most)
        fill_in(args.document, [where, *made])


def attention(target: Target, shapes: Shapes, loads: tuple[Load, ...]) -> Iterator[Times | Missing]:
    """Times the op with each cache that the target has, and all others with bfloat16 alone."""
    for load in loads:
        for cache in CACHES:
            if cache != "float8_e4m3fn" or target.multiplies_fp8:
                held = replace(shapes, cache=cache)
                yield timed("Pallasite", load, held, *_op(target, held, load))
        held = replace(shapes, cache="bfloat16")
        for name, make in _others(target, load):
            try:
                yield timed(name, load, held, *make(target, held, load))
            except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
                reason = str(error).partition("\n")[0]
                say(f"{name}: {reason}")
                yield Missing(kernel=name, load=load.name, reason=reason)


def timed(name: str, load: Load, shapes: Shapes, step: Any, carry: Any, constants: Any) -> Times:
    """Times `step(index, carry, constants)`, which returns the next carry."""
    say(f"{name}: {load.name}, {shapes.cache}")
    flops = 4 * shapes.num_heads * shapes.head_width * load.num_scores()
    num_bytes = load.num_bytes(shapes)
    num_steps = int(np.clip(RUN_S / (num_bytes / 2e12 + flops / 2e14), 4, 256))
    times = seconds(step, carry, constants, num_steps)
    return Times(
        kernel=name,
        load=load.name,
        cache=shapes.cache,
        median_s=statistics.median(times),
        least_s=min(times),
        num_bytes=num_bytes,
        flops=flops,
    )


def measured_speeds(num_bytes: int, side: int) -> Speeds:
    """Measures a copy of so many bytes, and a product of square matrices."""
    copied = seconds(lambda _, x, __: x + 1, jnp.zeros(num_bytes // 4, jnp.float32), (), 10)
    key = jax.random.key(0)
    a, b = (jax.random.normal(k, (side, side), jnp.bfloat16) for k in jax.random.split(key))
    factor = jnp.asarray(side**-0.5, jnp.bfloat16)
    multiplied = seconds(lambda _, a, b: (a @ b) * factor, a, b, 10)
    return Speeds(
        bytes_per_s=2 * num_bytes / statistics.median(copied),
        flops=2 * side**3 / statistics.median(multiplied),
    )


def device_table(kind: str, target: Target, reached: Speeds) -> Table:
    """Returns what the device reached, beside its public figures."""
    headers = (
        *("device", "JAX", "copy, GB/s", "memory, GB/s (public)"),
        *("bfloat16 product, TFLOP/s", "TFLOP/s (public)"),
    )
    row = (
        *(kind, jax.__version__, round(reached.bytes_per_s / 1e9)),
        None if target.hbm_bytes_per_s is None else round(target.hbm_bytes_per_s / 1e9),
        round(reached.flops / 1e12),
        None if target.flops is None else round(target.flops / 1e12),
    )
    return Table(name="device", title="device", headers=headers, rows=(row,))


def attention_table(found: list[Times | Missing], reached: Speeds) -> Table:
    """Returns microseconds, and how they compare with a copy or a product of the same size."""
    rows: list[tuple[Any, ...]] = []
    for one in found:
        if isinstance(one, Missing):
            rows.append((one.load, one.kernel, "bfloat16", None, None, None, one.reason))
            continue
        memory_s, math_s = one.num_bytes / reached.bytes_per_s, one.flops / reached.flops
        rows.append(
            (
                one.load,
                one.kernel,
                one.cache,
                one.median_s * 1e6,
                round(one.num_bytes / one.median_s / 1e9),
                round(one.flops / one.median_s / 1e12),
                f"{max(memory_s, math_s) / one.median_s:.0%}",
            )
        )
    headers = "step", "kernel", "cache", "µs", "GB/s", "TFLOP/s", "of a copy's or product's speed"
    return Table(name="attention", title="attention", headers=headers, rows=tuple(rows))


def _op(target: Target, shapes: Shapes, load: Load) -> tuple[Any, Any, Any]:
    config = AttentionConfig(scale=shapes.head_width**-0.5, target=target)
    batch, num_pages = _batch(shapes, load)
    num_rows, width = target.cache_row(shapes.head_width)
    shape = (NUM_LAYERS, num_pages, shapes.num_kv_heads, num_rows, shapes.page, width)
    key = jax.random.key(0)
    values = jax.random.normal(key, shape, jnp.float32)
    scales = None
    if shapes.held_as.itemsize == 1:
        most = 127 if shapes.held_as == jnp.int8 else 448
        values = values * (most / 5)
        scales = jnp.full((*shape[:3], 2, shapes.page), 5 / most, jnp.float32)
    values = jnp.clip(values, -448, 448).astype(shapes.held_as)
    if target.holds_bfloat16_as_bits and shapes.cache == "bfloat16":
        values = jax.lax.bitcast_convert_type(values, jnp.uint16)
    q = jax.random.normal(key, (load.num_tokens, shapes.num_heads, shapes.head_width), jnp.float32)
    new = (load.num_tokens, shapes.num_kv_heads, 2, shapes.head_width)
    kv_new = jax.random.normal(key, new, jnp.float32).astype(jnp.bfloat16)

    def step(index: Any, carry: Any, constants: Any) -> Any:
        q, cache = carry
        kv_new, ragged = constants
        out, cache = paged_attention(q, kv_new, cache, index % NUM_LAYERS, ragged, config)
        return out.astype(q.dtype), cache

    return step, (q.astype(jnp.bfloat16), PagedCache(values=values, scales=scales)), (kv_new, batch)


def _batch(shapes: Shapes, load: Load) -> tuple[Ragged, int]:
    """Returns whose tokens are whose, and how many pages there are; they lie in random order."""
    lens = [length for _, length in load.requests]
    columns = -(-max(lens) // shapes.page)
    counts = [-(-length // shapes.page) for length in lens]
    pages = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
    table = np.zeros((len(lens), columns), np.int32)
    for row, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        table[row, :count] = pages[end - count : end]
    new = [count for count, _ in load.requests]
    positions = [np.arange(length - count, length) for count, length in load.requests]
    ragged = Ragged(
        positions=jnp.asarray(np.concatenate(positions), jnp.int32),
        kv_lens=jnp.asarray(lens, jnp.int32),
        query_starts=jnp.asarray(np.cumsum([0, *new]), jnp.int32),
        page_table=jnp.asarray(table),
        num_requests=jnp.asarray(len(lens), jnp.int32),
        num_decode=jnp.asarray(len(load.decode), jnp.int32),
    )
    return ragged, sum(counts)


def _others(target: Target, load: Load) -> list[tuple[str, Callable[..., Any]]]:
    """Returns JAX's kernels for this platform that do what the load asks for, or the reference."""
    if target.platform != "gpu":
        return []
    if not load.prefill:
        return [("JAX paged_attention", _gpu_paged), ("reference", _reference)]
    if load.is_prompt:
        return [("JAX mha", _gpu_mha), ("cuDNN", _cudnn)]
    return [("reference", _reference)]


def _reference(target: Target, shapes: Shapes, load: Load) -> tuple[Any, Any, Any]:
    """The op's definition in plain jnp, which is a CPU's body."""
    plain = replace(CPU, page_size=shapes.page, holds_bfloat16_as_bits=False)
    return _op(plain, shapes, load)


def _gpu_paged(target: Target, shapes: Shapes, load: Load) -> tuple[Any, Any, Any]:
    batch, num_pages = _batch(shapes, load)
    sized = replace(
        shapes,
        num_requests=len(load.decode),
        max_len=max(load.decode),
        cache_bytes=num_pages * shapes.page * 4 * shapes.num_kv_heads * shapes.head_width,
    )
    case = kernel_peers.gpu_paged_case(target, asdict(sized))
    q, keys, values, _, _, *scales = random_arguments(case)

    def step(_: Any, q: Any, constants: Any) -> Any:
        return case.function(q, *constants).astype(q.dtype)

    return step, q, (keys, values, batch.page_table, batch.kv_lens, *scales)


def _gpu_mha(target: Target, shapes: Shapes, load: Load) -> tuple[Any, Any, Any]:
    case = kernel_peers.gpu_mha_case(target, asdict(replace(shapes, num_tokens=load.num_tokens)))
    q, keys, values = random_arguments(case)
    return lambda _, q, kv: case.function(q, *kv).astype(q.dtype), q, (keys, values)


def _cudnn(target: Target, shapes: Shapes, load: Load) -> tuple[Any, Any, Any]:
    """The library's, of keys and values that lie one after another."""

    def make(num_heads: int) -> jax.Array:
        shape = (1, load.num_tokens, num_heads, shapes.head_width)
        return jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)

    def step(_: Any, q: Any, kv: Any) -> Any:
        return jax.nn.dot_product_attention(q, *kv, is_causal=True, implementation="cudnn")

    return step, make(shapes.num_heads), (make(shapes.num_kv_heads), make(shapes.num_kv_heads))


def _arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.kernel_times", description="Times of kernels.")
    parser.add_argument("--document", type=FILE, metavar="FILE", help="a page to fill in")
    parser.add_argument("--output", type=FILE, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
