"""What a weight is: one declaration gives its shape, form, logical axes and source.

A model is made of abstract weights, whose values are `jax.ShapeDtypeStruct`s, so that a model of
any size can be planned and compiled without memory; the loader makes the same tree with arrays.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from pallasite.models.errors import ConfigError
from pallasite.models.forms import BaseForm, Form, Rule, form_of, parse_form
from pallasite.models.partition import Partition
from pallasite.models.sharding import MODEL_AXIS, RULES, sharding
from pallasite.pallas_kernels.quantized_matmul import QuantizedMatrix
from pallasite.pallas_kernels.quantized_matmul.strips import fits, strip_shapes
from pallasite.pallas_kernels.storage import storage_dtype
from pallasite.pallas_kernels.target import CPU, Target

ModelT = TypeVar("ModelT", bound=nnx.Module)


def compute_dtype(form: BaseForm) -> jnp.dtype:
    """Returns what the inputs of matrix products, and a cache of floats, are rounded to."""
    return jnp.dtype({"f32": jnp.float32, "bf16": jnp.bfloat16}[form])


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint has a weight.

    Attributes:
        name: its Hugging Face name. Where that has `{layer}`, the weight stacks all layers along
            its first axis, which is then the logical axis "layers".
        shape: of the tensor there; a layer's, where it stacks layers.
        rows: the first row of the tensor that is the weight's, and the one after its last; None
            for all.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None

    @property
    def is_stacked(self) -> bool:
        return "{layer}" in self.name

    @property
    def pattern_name(self) -> str:
        """The name that the rules for forms are matched against."""
        return self.name.replace("{layer}", "*").removesuffix(".weight")

    def names(self, num_layers: int) -> list[str]:
        """Returns the tensors' names, one a layer where the weight stacks layers."""
        if not self.is_stacked:
            return [self.name]
        return [self.name.format(layer=layer) for layer in range(num_layers)]


class Weight(nnx.Param):
    """An array of parameters with the metadata `axes`, the logical names of its axes."""


class Matrix(nnx.Module):
    """A weight of matrix products `[out, in]`, or one a layer, in any form.

    Attributes:
        values: floats, or what a `QuantizedMatrix` holds.
        scales, minimums: a quantized one's; else None.
        axes: the logical names of its own axes, "layers" first where it stacks layers.
        form: how it is held.
        dtype: what its products' inputs are rounded to.
        source: where a checkpoint has it.
        target: what its products are compiled for.
        layer: whose it is, where it is one layer's beside the others'; else None.
        in_strips: whether it lies as the CPU's bodies read it, see `QuantizedMatrix`.
    """

    def __init__(
        self,
        parts: dict[str, Weight],
        axes: tuple[str, ...],
        held: tuple[Form, jnp.dtype, Source],
        target: Target = CPU,
        layer: Int[Array, ""] | None = None,
        in_strips: bool = False,
    ) -> None:
        self.values = parts["values"]
        self.scales = parts.get("scales")
        self.minimums = parts.get("minimums")
        self.axes = axes
        self.form, self.dtype, self.source = held
        self.target = target
        self.layer = layer
        self.in_strips = in_strips

    def of_layer(self, index: Int[Array, ""]) -> "Matrix":
        """Returns one layer's, of a matrix that stacks layers.

        Where kernels read it, it stays beside the others: they would be handed a copy otherwise.
        """
        platform, is_grouped = self.target.platform, self.form.group is not None
        by_kernels = platform == "gpu" or (platform == "tpu" and is_grouped)
        is_read_in_place = by_kernels or self.in_strips
        named = {"values": self.values, "scales": self.scales, "minimums": self.minimums}
        parts = {name: part for name, part in named.items() if part is not None}
        if not is_read_in_place:
            parts = jax.tree.map(
                lambda part: jax.lax.dynamic_index_in_dim(part, index, keepdims=False), parts
            )
        held = (self.form, self.dtype, self.source)
        layer = index if is_read_in_place else None
        return Matrix(parts, self.axes, held, self.target, layer, self.in_strips)

    def product(self) -> QuantizedMatrix:
        """Returns one layer's matrix, or an unstacked one, as the products' op takes it."""
        return QuantizedMatrix(
            values=self.values[...],
            scales=None if self.scales is None else self.scales[...],
            minimums=None if self.minimums is None else self.minimums[...],
            quantizes_inputs=self.form.quantizes_inputs,
            in_strips=self.in_strips,
            layer=self.layer,
            target=self.target,
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows of a packed tensor that are a weight's: as many as it has, from `start` on.

    Attributes:
        num_rows: of the tensor.
    """

    start: int
    num_rows: int


class Declare:
    """Declares the weights of one model, in forms that rules choose, laid out for a partition.

    Shapes are the model's own; what is declared is padded and copied as the partition says.
    """

    def __init__(
        self, base: BaseForm, target: Target, partition: Partition, rules: tuple[Rule, ...]
    ) -> None:
        self.partition = partition
        self.target = target
        self.names: list[str] = []
        self._base = parse_form(base)
        self._dtype = compute_dtype(base)
        self._rules = rules

    def matrix(
        self, shape: tuple[int, ...], axes: tuple[str, ...], name: str, part: Part | None = None
    ) -> Matrix:
        """Declares a weight of a matrix product, `[..., out, in]`, or an embedding.

        Raises ConfigError where its form's groups do not fit its inputs.
        """
        source = _source(shape, axes, name, part)
        self.names.append(source.pattern_name)
        form = form_of(source.pattern_name, self._rules) or self._base
        held = self._held(shape, axes)
        if form.is_quantized:
            parts = self._quantized_parts(held, axes, form, source)
            in_strips = "tile" in parts["values"].get_metadata("axes")
            described = (form, self._dtype, source)
            return Matrix(parts, axes, described, self.target, in_strips=in_strips)
        dtype = compute_dtype("f32" if form.kind == "f32" else "bf16")
        if form.kind == "bf16" and self._fits_strips(held, axes, form):
            parts = self._strips(held, axes, form)
            return Matrix(parts, axes, (form, dtype, source), self.target, in_strips=True)
        # Only what is sliced layer by layer has to be held as bits where bfloat16 is.
        held_as = storage_dtype(dtype, self.target) if source.is_stacked else dtype
        parts = {"values": _weight(held, axes, held_as)}
        return Matrix(parts, axes, (form, dtype, source), self.target)

    def vector(self, shape: tuple[int, ...], axes: tuple[str, ...], name: str) -> Weight:
        """Declares a norm's scale or a bias: always f32, since it costs nothing."""
        source = _source(shape, axes, name, None)
        return _weight(self._held(shape, axes), axes, jnp.dtype(jnp.float32), source)

    def _held(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> tuple[int, ...]:
        pairs = zip(axes, shape, strict=True)
        return tuple(self.partition.axis(axis, size).size for axis, size in pairs)

    def _quantized_parts(
        self, held: tuple[int, ...], axes: tuple[str, ...], form: Form, source: Source
    ) -> dict[str, Weight]:
        num_inputs, stored = held[-1], source.shape[-1]
        if form.group is not None and stored % form.group:
            raise ConfigError(
                f"got the form {form} for {source.pattern_name}, whose rows have {stored} inputs;"
                f" the group must divide {stored}; choose another group"
            )
        num_parts = self.partition.num_parts if RULES[axes[-1]] == MODEL_AXIS else 1
        if form.group is not None and num_inputs % (num_parts * form.group):
            raise ConfigError(
                f"got the form {form} for {source.pattern_name}, whose rows have {num_inputs}"
                f" inputs over {num_parts} devices; the group must divide"
                f" {num_inputs // num_parts}; choose another group or mesh"
            )
        if self._fits_strips(held, axes, form):
            return self._strips(held, axes, form)
        is_packed = form.kind == "int4"
        dtype = {"int4": jnp.uint8, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[form.kind]
        inputs = num_inputs // 2 if is_packed else num_inputs
        groups = 1 if form.group is None else num_inputs // form.group
        # A whole row's scale belongs to every device's part of the row.
        group_axes = (*axes[:-1], axes[-1] if groups > 1 else "group")
        parts = {
            "values": _weight((*held[:-1], inputs), axes, jnp.dtype(dtype)),
            "scales": _weight((*held[:-1], groups), group_axes, jnp.dtype(jnp.float32)),
        }
        if is_packed:
            shape = (*held[:-1], groups)
            parts["minimums"] = _weight(shape, group_axes, jnp.dtype(jnp.float32))
        return parts

    def _fits_strips(self, held: tuple[int, ...], axes: tuple[str, ...], form: Form) -> bool:
        """Whether the CPU's bodies are there and take the part of a matrix that a device has."""
        is_multiplied = form.quantizes_inputs or form.kind == "bf16"
        if not self.target.instructions or not is_multiplied:
            return False
        rows, inputs = (
            size // (self.partition.num_parts if RULES[axis] == MODEL_AXIS else 1)
            for axis, size in zip(axes[-2:], held[-2:], strict=True)
        )
        # A scale for a whole row is a scale for a token's whole row, too.
        has_groups = form.kind == "bf16" or form.group is not None
        return has_groups and fits(rows, inputs, form.group)

    def _strips(
        self, held: tuple[int, ...], axes: tuple[str, ...], form: Form
    ) -> dict[str, Weight]:
        scale_type = jnp.dtype(jnp.float16 if form.has_half_scales else jnp.float32)
        values_type = jnp.dtype(jnp.uint16 if form.kind == "bf16" else jnp.uint8)
        parts = {}
        for name, shape in strip_shapes(form.kind, held[-2], held[-1]).items():
            tile = ("tile",) * (len(shape) - 2)
            dtype = values_type if name == "values" else scale_type
            parts[name] = _weight((*held[:-2], *shape), (*axes, *tile), dtype)
        return parts


Declared = Weight | Matrix


def declared_weights(model: nnx.Module) -> Iterator[tuple[str, Declared]]:
    """Yields every vector and matrix with its dotted path, in the order of the model's leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, Declared))
    for path, weight in leaves[0]:
        yield ".".join(str(getattr(key, "name", key)) for key in path), weight


def holds_strips(model: nnx.Module) -> bool:
    """Whether any matrix lies as the CPU's bodies read it."""
    weights = declared_weights(model)
    return any(isinstance(weight, Matrix) and weight.in_strips for _, weight in weights)


def named_weights(model: nnx.Module) -> Iterator[tuple[str, Weight]]:
    """Yields every array with its dotted path, in the order of `jax.tree.leaves(model)`."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, Weight))
    for path, weight in leaves[0]:
        yield ".".join(str(getattr(key, "name", key)) for key in path), weight


def source_of(weight: Declared) -> Source:
    """Returns where a checkpoint has a vector or a matrix."""
    return weight.source if isinstance(weight, Matrix) else weight.get_metadata("source")


def placed(model: ModelT, mesh: Mesh) -> ModelT:
    """Returns an abstract model with each weight's placement on the mesh filled in."""
    weights = [weight for _, weight in named_weights(model)]
    structs = [
        jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding(mesh, w.get_metadata("axes")))
        for w in weights
    ]
    return jax.tree.unflatten(jax.tree.structure(model), structs)


def num_bytes(model: nnx.Module) -> int:
    """Returns the bytes of all weights over all model shards, abstract or not."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))


def _source(shape: tuple[int, ...], axes: tuple[str, ...], name: str, part: Part | None) -> Source:
    if len(shape) != len(axes):
        raise ValueError(f"got {len(axes)} axes for the shape {shape} of {name}")
    own = shape[1:] if "{layer}" in name else shape
    if part is None:
        return Source(name=name, shape=own)
    rows = (part.start, part.start + own[0])
    return Source(name=name, shape=(part.num_rows, *own[1:]), rows=rows)


def _weight(
    shape: tuple[int, ...], axes: tuple[str, ...], dtype: jnp.dtype, source: Source | None = None
) -> Weight:
    struct = jax.ShapeDtypeStruct(shape, dtype)
    return Weight(struct, axes=axes, source=source, eager_sharding=False)
