"""What a step moves and computes for a product with a quantized matrix, by the TPU's compiler.

    python -m benchmarks.quantized --target tpu:v6e

No TPU is needed, but its compiler is. A program runs a rolled loop over layers, as a model's step
does, with one product in each. Figures are of one layer and static: bytes that instructions move to
and from device memory, and bundles, which are cycles without any stall. Their quotient, times the
memory's bandwidth, is the clock below which reading the memory takes less long than computing.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.options import run
from pallasite.models.errors import ConfigError
from pallasite.models.forms import parse_form
from pallasite.pallas_kernels.compile import Case, CompileError, Process, Report, compile_for
from pallasite.pallas_kernels.quantized_matmul import QuantizedMatrix, quantized_matmul, tpu
from pallasite.pallas_kernels.target import CPU, Target, find_target
from pallasite.server.arguments import Parser

NUM_LAYERS = 8
FORMS = ("int8", "int8:128", "w8a8", "w8a8:128", "int4:32", "int4:128", "fp8")
SHAPES = ("4096x4096", "14336x4096", "4096x14336")
"""Rows x inputs: Llama 3 8B's."""
TOKENS = (8, 64, 512)
BODIES = ("xla", "kernel")
TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One product of a layer.

    Attributes:
        body: "xla", or "kernel" where the op has one.
        stored_bytes: of the matrix and its scales.
        moved_bytes: that instructions of the loop read and write.
        temporary_bytes: device memory of the program beside what it is given.
        bundles: of the loop's instructions.
        is_lower_bound: whether some of them have loops whose count is not known, and so are left
            out of `bundles`.
        compile_s: seconds.
    """

    form: str
    shape: str
    num_tokens: int
    body: str
    stored_bytes: int
    moved_bytes: float
    temporary_bytes: int
    bundles: float
    is_lower_bound: bool
    compile_s: float

    def break_even_hz(self, target: Target) -> float:
        """Returns the clock at which all bundles take as long as reading what is stored."""
        assert target.hbm_bytes_per_s is not None
        return self.bundles * target.hbm_bytes_per_s / self.stored_bytes


def main() -> None:
    """Compiles and prints. Raises ConfigError for what is no chip, form, shape or number."""
    args = _arguments()
    target, forms = _target(args.target), args.forms.split(",")
    shapes = [_shape(text) for text in args.shapes.split(",")]
    tokens = [_whole("--tokens", text) for text in args.tokens.split(",")]
    for form in forms:
        parse_form(form)
    rows = []
    for form in forms:
        for shape in shapes:
            for num_tokens in tokens:
                for body in BODIES:
                    name = f"{form} {shape} {num_tokens} {body}"
                    try:
                        row = figures(target, form, shape, num_tokens, body)
                    except CompileError as error:
                        # XLA alone may take longer than anybody waits.
                        print(f"{name}: {error}", file=sys.stderr)
                        continue
                    if row is not None:
                        print(f"{name}: {row.compile_s:.0f} s", file=sys.stderr)
                        rows.append(row)
    print(table(target, rows))
    if args.output is not None:
        args.output.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def layers(target: Target, form: str, shape: str, num_tokens: int, body: str) -> Case:
    """A loop over layers whose products decide what the next layer takes, as norms do."""
    num_rows, num_inputs = map(int, shape.split("x"))
    matrix = stacked_matrix(form, num_rows, num_inputs)

    def function(x: jax.Array, matrix: QuantizedMatrix) -> jax.Array:
        def layer(index: jax.Array, x: jax.Array) -> jax.Array:
            # For a CPU the op has no kernel: what is left is XLA's, for whatever it compiles.
            of = CPU if body == "xla" else target
            product = quantized_matmul(
                x, replace(matrix, layer=index, target=of), jnp.dtype(jnp.bfloat16)
            )
            mean_square = jnp.mean(jnp.square(product), axis=1, keepdims=True)
            return x * jax.lax.rsqrt(mean_square + 1)

        return jax.lax.fori_loop(0, NUM_LAYERS, layer, x)

    return Case(function, (_struct((num_tokens, num_inputs), jnp.float32), matrix))


def stacked_matrix(form: str, num_rows: int, num_inputs: int) -> QuantizedMatrix:
    """Returns the shapes of all layers' matrices `[L, out, in]`, as models hold them."""
    parsed = parse_form(form)
    is_packed = parsed.kind == "int4"
    dtype = {"int4": jnp.uint8, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[parsed.kind]
    groups = 1 if parsed.group is None else num_inputs // parsed.group
    inputs = num_inputs // 2 if is_packed else num_inputs
    scales = _struct((NUM_LAYERS, num_rows, groups), jnp.float32)
    return QuantizedMatrix(
        values=_struct((NUM_LAYERS, num_rows, inputs), dtype),
        scales=scales,
        minimums=scales if is_packed else None,
        quantizes_inputs=parsed.quantizes_inputs,
    )


def figures(target: Target, form: str, shape: str, num_tokens: int, body: str) -> Figures | None:
    """Compiles one case and reads its figures off the report; None where there is no kernel."""
    options = {"form": form, "shape": shape, "num_tokens": num_tokens, "body": body}
    if body == "kernel" and not has_kernel(form, shape, num_tokens):
        return None
    told = compile_for(
        "benchmarks.quantized:layers",
        target,
        options,
        "analyze",
        process=Process(timeout_s=TIMEOUT_S),
    )
    held = jax.tree.leaves(stacked_matrix(form, *map(int, shape.split("x"))))
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in held) // NUM_LAYERS
    moved, bundles, is_lower_bound = per_layer(told)
    assert told.memory is not None
    return Figures(
        form=form,
        shape=shape,
        num_tokens=num_tokens,
        body=body,
        stored_bytes=stored,
        moved_bytes=moved + stored * len(told.kernels),
        temporary_bytes=told.memory.temporaries,
        bundles=bundles,
        is_lower_bound=is_lower_bound,
        compile_s=told.compile_s,
    )


def has_kernel(form: str, shape: str, num_tokens: int) -> bool:
    """Whether the op has a TPU's kernel for a product."""
    matrix = stacked_matrix(form, *map(int, shape.split("x")))
    return tpu.takes(num_tokens, matrix, jnp.dtype(jnp.bfloat16))


def per_layer(told: Report) -> tuple[float, float, bool]:
    """Returns the bytes and the bundles of all that is in the loop over layers.

    The third value tells whether a fusion or a kernel is missing from the bundles. Others without
    bundles are a scalar's.
    """
    moved = bundles = 0.0
    is_lower_bound = False
    for instruction in told.instructions:
        if instruction.times % NUM_LAYERS == 0:
            times = instruction.times / NUM_LAYERS
            moved += times * ((instruction.bytes_read or 0) + (instruction.bytes_written or 0))
            bundles += times * (instruction.bundles or 0)
            is_large = instruction.opcode in ("fusion", "custom-call")
            is_lower_bound |= is_large and instruction.bundles is None
    return moved, bundles, is_lower_bound


def table(target: Target, rows: Iterable[Figures]) -> str:
    """Returns the figures as text; bytes are MB."""
    headers = [
        "form",
        "matrix",
        "tokens",
        "body",
        "stored",
        "moved",
        "temporaries",
        "bundles",
        "GHz",
    ]
    cells = [
        [
            row.form,
            row.shape,
            row.num_tokens,
            row.body,
            f"{row.stored_bytes / 1e6:.1f}",
            f"{row.moved_bytes / 1e6:.1f}",
            f"{row.temporary_bytes / 1e6:.1f}",
            f"{'>= ' if row.is_lower_bound else ''}{row.bundles:,.0f}",
            f"{'>= ' if row.is_lower_bound else ''}{row.break_even_hz(target) / 1e9:.2f}",
        ]
        for row in rows
    ]
    return report.table(f"a layer's product on {target.name}, bytes in MB", headers, cells)


def _target(name: str) -> Target:
    try:
        target = find_target(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if target.platform != "tpu":
        raise ConfigError(f"got --target {name}; the figures are of TPUs; name one, as tpu:v6e")
    return target


def _shape(text: str) -> str:
    num_rows, separator, num_inputs = text.partition("x")
    if not separator:
        raise ConfigError(f"got --shapes {text!r}; it must be rows x inputs, as 14336x4096")
    return f"{_whole('--shapes', num_rows)}x{_whole('--shapes', num_inputs)}"


def _whole(flag: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ConfigError(f"got {text!r} in {flag}; it must be whole numbers above 0; change it")
    return int(text)


def _struct(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks.quantized",
        description="Static figures of quantized products on a TPU.",
    )
    parser.add_argument("--target", required=True, help="such as tpu:v6e")
    for name, values, what in (
        ("--forms", FORMS, "forms of weights"),
        ("--shapes", SHAPES, "rows x inputs of matrices"),
        ("--tokens", TOKENS, "numbers of tokens"),
    ):
        given = ",".join(map(str, values))
        parser.add_argument(name, default=given, help=f"{what} (default: {given})")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
