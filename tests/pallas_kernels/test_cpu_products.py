"""The CPU's bodies of products, for every instruction set that runs here, against float64.

Tolerance: that of `test_quantized_matmul.py`, output by output. What is fused is held to the same
product with the norm, the gate or the sum made in float64 around it.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallasite.pallas_kernels import cpu
from pallasite.pallas_kernels.quantized_matmul import (
    Fused,
    QuantizedMatrix,
    dequantize,
    fused_matmul,
    fuses,
    quantized_matmul,
    rows_of,
    strips,
)
from pallasite.pallas_kernels.target import CPU, cpu_target
from tests.pallas_kernels.quantized_oracle import UNIT, Case

RUNNING = [name for name in cpu.INSTRUCTIONS if cpu.runs(name)]
KINDS = ("q4_1", "w4a8", "q8_0", "w8a8", "bf16")
NUM_LAYERS, LAYER = 3, 1

each_body = pytest.mark.parametrize("instructions", RUNNING)
each_kind = pytest.mark.parametrize("kind", KINDS)


class Held:
    """A matrix of one kind: what it stands for, and the op's view of it in stacked strips."""

    def __init__(self, rng, kind, out, num_inputs):
        self.kind, self.shape = kind, (NUM_LAYERS, out, num_inputs)
        groups = (NUM_LAYERS, out, num_inputs // 32)
        held_as = np.float16 if kind.startswith("q") else np.float32
        self.scales = self.minimums = None
        if kind == "bf16":
            self.values = rng.standard_normal(self.shape).astype(ml_dtypes.bfloat16)
            return
        self.scales = rng.uniform(0.5, 1.5, groups).astype(held_as)
        if "4" in kind[:2]:
            self.values = rng.integers(0, 16, self.shape).astype(np.uint8)
            low = self.scales.astype(np.float32) * rng.normal(-7.5, 2, groups)
            self.minimums = low.astype(held_as)
        else:
            self.values = rng.integers(-128, 128, self.shape).astype(np.int8)

    def matrix(self, target, is_stacked=True):
        layers = [self._layer(layer) for layer in range(NUM_LAYERS)]
        parts = jax.tree.map(lambda *own: jnp.asarray(np.stack(own)), *layers)
        if not is_stacked:
            parts = jax.tree.map(lambda part: part[LAYER], parts)
        return QuantizedMatrix(
            **parts,
            quantizes_inputs=self.kind != "bf16",
            in_strips=True,
            layer=jnp.int32(LAYER) if is_stacked else None,
            target=target,
        )

    def _layer(self, layer):
        values = self.values[layer]
        if self.kind == "bf16":
            return {"values": strips.pack_floats(values.view(np.uint16))}
        pack = strips.pack_bytes if self.minimums is None else strips.pack_nibbles
        parts = {"values": pack(values), "scales": self.scales[layer]}
        if self.minimums is not None:
            parts["minimums"] = self.minimums[layer]
        num_inputs = values.shape[1]
        return {
            name: part if name == "values" else strips.pack_scales(part, num_inputs)
            for name, part in parts.items()
        }

    def weight(self):
        """f64 [out, in] of the layer."""
        values = self.values[LAYER].astype(np.float64)
        if self.scales is None:
            return values
        groups = values.reshape(*self.scales[LAYER].shape, 32)
        groups = groups * self.scales[LAYER].astype(np.float64)[..., None]
        if self.minimums is not None:
            groups = groups + self.minimums[LAYER].astype(np.float64)[..., None]
        return groups.reshape(values.shape)

    def product(self, x, instructions):
        """f64 [T, out] of f32 x, and how far from each a right answer may lie."""
        if self.kind == "bf16":
            rounded = x.astype(ml_dtypes.bfloat16).astype(np.float64)
            magnitude = np.abs(rounded) @ np.abs(self.weight()).T
            return rounded @ self.weight().T, (x.shape[1] + 4) * UNIT * magnitude
        packed = self.values[LAYER]
        if self.minimums is not None:
            pairs = packed.reshape(len(packed), -1, 2, 16)
            packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(packed), -1)
        case = Case(
            x=x,
            values=packed,
            scales=self.scales[LAYER].astype(np.float32),
            minimums=None if self.minimums is None else self.minimums[LAYER].astype(np.float32),
            quantizes_inputs=True,
            keeps_largest=True,
            dots_pairs=instructions == "avx512-vnni",
        )
        return case.product(np.dtype(ml_dtypes.bfloat16))


def make_x(rng, T, num_inputs):
    return (rng.standard_normal((T, num_inputs)) * 10 ** rng.uniform(-1, 1, (T, 1))).astype(
        np.float32
    )


def check(out, expected, tolerance):
    out = np.asarray(out)
    assert out.shape == expected.shape
    assert np.isfinite(out).all()
    assert (np.abs(out - expected) <= tolerance).all(), np.abs(out - expected).max()


def test_bodies_run_where_they_are_built():
    if cpu.library_path() is None:
        pytest.skip("the bodies are not built here: no compiler when the package was installed")
    assert cpu.best_instructions() == (RUNNING[0] if RUNNING else "")


@each_body
@each_kind
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 7, 12, 13, 31, 100])
def test_products(instructions, kind, T, rng):
    target = cpu_target(instructions)
    for out, num_inputs in ((16, 32), (48, 96), (208, 224)):
        held, x = Held(rng, kind, out, num_inputs), make_x(rng, T, num_inputs)
        dtype = jnp.dtype(jnp.bfloat16)
        for is_stacked in (True, False):
            matrix = held.matrix(target, is_stacked)
            check(
                jax.jit(quantized_matmul, static_argnums=2)(x, matrix, dtype),
                *held.product(x, instructions),
            )


@each_body
@each_kind
def test_rows_of_outputs_that_are_far_apart(instructions, kind, rng):
    """An output head's, which are stored past the caches."""
    held, x = Held(rng, kind, 16400, 32), make_x(rng, 14, 32)
    out = jax.jit(quantized_matmul, static_argnums=2)(
        x, held.matrix(cpu_target(instructions)), jnp.dtype(jnp.bfloat16)
    )
    check(out, *held.product(x, instructions))


@each_body
@each_kind
@pytest.mark.parametrize(("T", "out", "num_inputs"), [(601, 80, 1632), (1300, 48, 320)])
def test_many_rows_and_inputs(instructions, kind, T, out, num_inputs, rng):
    """More inputs than are unpacked, and more rows than wait for their next inputs, at once."""
    held, x = Held(rng, kind, out, num_inputs), make_x(rng, T, num_inputs)
    result = jax.jit(quantized_matmul, static_argnums=2)(
        x, held.matrix(cpu_target(instructions)), jnp.dtype(jnp.bfloat16)
    )
    check(result, *held.product(x, instructions))


@each_body
@each_kind
def test_a_gated_row_does_not_depend_on_those_beside_it(instructions, kind, rng):
    gate, up = Held(rng, kind, 48, 1600), Held(rng, kind, 48, 1600)
    x = make_x(rng, 130, 1600) * np.float32(0.005)
    fused = Fused(gate="silu", norm=jnp.ones(1600, jnp.float32), epsilon=1e-5)
    matrices = [own.matrix(cpu_target(instructions)) for own in (gate, up)]
    whole = np.asarray(fused_matmul(jnp.asarray(x), matrices, fused))
    assert np.isfinite(whole).all()
    assert len(np.unique(whole)) > whole.size / 2
    for first, last in ((0, 1), (3, 15), (60, 130)):
        part = fused_matmul(jnp.asarray(x[first:last]), matrices, fused)
        np.testing.assert_array_equal(part, whole[first:last])


@each_body
@each_kind
@pytest.mark.parametrize("T", [3, 70])
def test_what_is_no_number_stays_none(instructions, kind, T, rng):
    held, x = Held(rng, kind, 32, 96), make_x(rng, T, 96)
    matrix = held.matrix(cpu_target(instructions))
    for place in (0, 7, 16, 31, 50, 95):
        for wrong in (np.nan, np.inf):
            some = x.copy()
            some[1, place] = wrong
            out = np.asarray(fused_matmul(jnp.asarray(some), [matrix], Fused()))
            assert not np.isfinite(out[1]).any()
            assert np.isfinite(np.delete(out, 1, axis=0)).all()


@each_body
@each_kind
def test_a_row_does_not_depend_on_those_beside_it(instructions, kind, rng):
    held, x = Held(rng, kind, 48, 160), make_x(rng, 151, 160)
    matrix = held.matrix(cpu_target(instructions))
    whole = np.asarray(fused_matmul(jnp.asarray(x), [matrix], Fused()))
    for first, last in ((0, 1), (5, 7), (3, 15), (28, 77), (140, 151)):
        part = fused_matmul(jnp.asarray(x[first:last]), [matrix], Fused())
        np.testing.assert_array_equal(part, whole[first:last])


@each_body
@pytest.mark.parametrize("T", [3, 100])
def test_groups_that_are_their_minimum(instructions, T, rng):
    """Quantizers give no scale to weights that are all the same."""
    held, x = Held(rng, "q4_1", 48, 160), make_x(rng, T, 160)
    held.scales[:, ::3, ::2] = 0
    held.minimums[:, 1::3, 1::2] = 0
    out = fused_matmul(jnp.asarray(x), [held.matrix(cpu_target(instructions))], Fused())
    check(out, *held.product(x, instructions))


@each_body
@each_kind
def test_rows_that_are_not_in_use_may_hold_anything(instructions, kind, rng):
    held, x = Held(rng, kind, 32, 64), make_x(rng, 20, 64)
    matrix = held.matrix(cpu_target(instructions))
    expected, tolerance = held.product(x, instructions)
    x[9:] = np.nan
    for count in (0, 1, 9):
        fused = Fused(count=jnp.int32(count))
        out = jax.jit(lambda x, m, f: fused_matmul(x, [m], f))(x, matrix, fused)
        check(out[:count], expected[:count], tolerance[:count])


@each_body
@each_kind
def test_what_is_fused(instructions, kind, rng):
    target, T, D, F = cpu_target(instructions), 7, 96, 64
    gate, up, other = (Held(rng, kind, n, D) for n in (F, F, 32))
    x = make_x(rng, T, D)
    norms = rng.uniform(0.5, 2, (NUM_LAYERS, D)).astype(np.float32)
    residual = rng.standard_normal((T, 2 * F + 32)).astype(np.float32)
    matrices = [held.matrix(target) for held in (gate, up, other)]
    epsilon = 1e-5
    wide = x.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + epsilon) * norms[LAYER]
    # What is rounded next may lie between two numbers: half a step of the largest of its group.
    groups = np.abs(normed).reshape(T, -1, 32).max(-1)
    step = groups / 127 if kind != "bf16" else groups / 256
    near = 1e-3 * np.repeat(step, 32, axis=1) @ np.ones((D, 1))
    parts = [held.product(normed.astype(np.float32), instructions) for held in (gate, up, other)]
    largest = max(np.abs(held.weight()).max() for held in (gate, up, other))
    slack = np.concatenate([own for _, own in parts], axis=1) + near * largest
    # A tie that falls the other way is a whole step of one input.
    slack = slack + step.max(axis=1, keepdims=True) * largest
    expected = np.concatenate([own for own, _ in parts], axis=1)
    fused = Fused(norm=jnp.asarray(norms), epsilon=epsilon, residual=jnp.asarray(residual))
    out = jax.jit(lambda x, m, f: fused_matmul(x, m, f))(x, matrices, fused)
    check(out, expected + residual, slack + 4 * UNIT * np.abs(residual))
    assert (np.abs(expected) > 5 * slack).mean() > 0.5
    one_norm = Fused(norm=jnp.asarray(norms[LAYER]), epsilon=epsilon)
    np.testing.assert_array_equal(
        fused_matmul(jnp.asarray(x), matrices, one_norm),
        fused_matmul(jnp.asarray(x), matrices, Fused(norm=jnp.asarray(norms), epsilon=epsilon)),
    )


@each_body
@each_kind
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gates(instructions, kind, activation, rng):
    target = cpu_target(instructions)
    gate, up = Held(rng, kind, 48, 64), Held(rng, kind, 48, 64)
    x = make_x(rng, 14, 64) * np.float32(0.02)
    x[3] *= 1e4  # far out on both sides of the gate
    fused = Fused(gate=activation)
    out = fused_matmul(jnp.asarray(x), [gate.matrix(target), up.matrix(target)], fused)
    (g, g_slack), (u, u_slack) = gate.product(x, instructions), up.product(x, instructions)
    with np.errstate(over="ignore"):
        if activation == "silu":
            active = g / (1 + np.exp(-g))
        else:
            active = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    # Neither gate is steeper than 1.13.
    slack = 1.13 * g_slack * (np.abs(u) + u_slack) + np.abs(active) * u_slack
    check(out, active * u, slack + 2e-6 * np.abs(active * u) + 1e-6 * np.abs(u))
    # Where minimums are rounded to bfloat16 an answer is less sure.
    is_coarse = instructions == "avx512-vnni" and gate.minimums is not None
    assert (np.abs(active * u) > (30 if is_coarse else 100) * slack).mean() > 0.3


@each_kind
def test_strips_stand_for_what_was_packed(kind, rng):
    held = Held(rng, kind, 48, 96)
    matrix = held.matrix(CPU, is_stacked=False)
    assert (matrix.num_rows, matrix.num_inputs) == (48, 96)
    index = jnp.asarray([0, 17, 47, 16, 1])
    rows = rows_of(matrix, index)
    assert not rows.in_strips
    if kind == "bf16":
        found = np.asarray(rows.values).view(ml_dtypes.bfloat16).astype(np.float64)
        np.testing.assert_array_equal(found, held.weight()[np.asarray(index)])
        plain = np.asarray(strips.unpack(matrix).values).view(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(plain.astype(np.float64), held.weight())
        return
    largest = np.abs(held.weight()).max()
    np.testing.assert_allclose(dequantize(matrix), held.weight(), atol=4 * UNIT * largest)
    expected = held.weight()[np.asarray(index)]
    np.testing.assert_allclose(dequantize(rows), expected, atol=4 * UNIT * largest)


def test_scales_of_larger_groups_are_repeated(rng):
    scales = rng.uniform(1, 2, (32, 2)).astype(np.float32)
    packed = strips.pack_scales(scales, 256)
    assert packed.shape == (2, 8, 16)
    for row, group in ((0, 0), (17, 3), (31, 7)):
        assert packed[row // 16, group, row % 16] == scales[row, group // 4]
    assert strips.fits(32, 256, 128)
    assert not any((strips.fits(24, 256, 32), strips.fits(32, 48, None), strips.fits(32, 256, 16)))


def test_without_bodies_strips_are_xlas(rng):
    held, x = Held(rng, "q4_1", 32, 64), make_x(rng, 5, 64)
    matrix = held.matrix(CPU, is_stacked=False)
    assert not fuses(matrix)
    check(quantized_matmul(jnp.asarray(x), matrix, jnp.dtype(jnp.bfloat16)), *held.product(x, ""))


@each_body
@each_kind
def test_a_loop_over_layers_copies_no_matrix(instructions, kind, rng):
    matrix = Held(rng, kind, 1600, 320).matrix(cpu_target(instructions))

    @jax.jit
    def run(x, parts):
        def layer(index, x):
            own = jax.tree.unflatten(structure, [*parts[:-1], index])
            return x + fused_matmul(x, [own], Fused())[:, :320]

        return jax.lax.fori_loop(0, NUM_LAYERS, layer, x)

    parts, structure = jax.tree.flatten(matrix)
    assert parts[-1].shape == ()
    compiled = run.lower(jnp.zeros((2, 320)), parts).compile()
    # Some rows of outputs, but nothing of a matrix's size.
    assert compiled.memory_analysis().temp_size_in_bytes < 1600 * 320 // 8


FAULTS = {
    "got layer 7 of 3": {"layer": 7},
    "got 9 rows in use of 4": {"count": 9},
    "got -1 rows in use of 4": {"count": -1},
    "got 96 inputs for a matrix of 64": {"width": 96},
    r"got a norm \[32\] for 64 inputs": {"norm": 32},
    r"got the residual \[4, 16\]; it must be \[4, 32\]": {"residual": 16},
    "got a gate and its values with different numbers of outputs": {"up": 48},
    "got matrices of bfloat16 and of integers in one product": {"kinds": ("q4_1", "bf16")},
    "got a program for a processor with none; this one lacks it": {"instructions": "none"},
}


@pytest.mark.skipif(not RUNNING, reason="no body runs here")
@pytest.mark.parametrize("message", FAULTS)
def test_what_contradicts_itself_is_an_error_that_names_it(message, rng):
    fault = FAULTS[message]
    target = cpu_target(fault.get("instructions", RUNNING[0]))
    kinds = fault.get("kinds", ("q4_1",))
    matrices = [Held(rng, kind, 32, 64).matrix(target) for kind in kinds]
    options = {}
    if "layer" in fault:
        matrices[0] = jax.tree.unflatten(
            jax.tree.structure(matrices[0]),
            [*jax.tree.leaves(matrices[0])[:-1], jnp.int32(fault["layer"])],
        )
    if "count" in fault:
        options["count"] = jnp.int32(fault["count"])
    if "norm" in fault:
        options["norm"] = jnp.ones(fault["norm"])
    if "residual" in fault:
        options["residual"] = jnp.ones((4, fault["residual"]))
    if "up" in fault:
        matrices.append(Held(rng, "q4_1", fault["up"], 64).matrix(target))
        options["gate"] = "silu"
    x = jnp.ones((4, fault.get("width", 64)))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        jax.block_until_ready(fused_matmul(x, matrices, Fused(**options)))
