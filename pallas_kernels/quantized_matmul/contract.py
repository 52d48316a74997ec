"""The types of the quantized matmul op, shared by the op and its bodies."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from pallasite.pallas_kernels.target import CPU, Target


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """A matrix `[out, in]`, each row of which is cut into groups with a scale each.

    The fields are typed Any since the same tree also holds abstract shapes and placements.

    Attributes:
        values: int8 or float8_e4m3fn `[out, in]`; or uint8 `[out, in / 2]`, two 4-bit values in a
            byte: those of a group's first half in the low bits, those of its second half in the
            high ones; or floats, f32, bfloat16 or its bits in uint16, which stand for themselves.
            In strips they lie as strips.py says.
        scales: f32 `[out, groups]`; one group is the whole row. None for floats.
        minimums: for 4-bit values, f32 `[out, groups]`: a value v stands for v * scale + minimum.
            Float, so that what was rounded so before (GGUF's Q4_1, AWQ, GPTQ) is held exactly. None
            for others, where v stands for v * scale.
        quantizes_inputs: whether what it is multiplied with is rounded to int8 too, each token's
            part of a group with a scale of its own.
        in_strips: whether the parts lie in strips of rows, as the CPU's bodies read them. Inputs
            that are rounded are so in groups of 32, and the largest of each stays as it is.
        layer: where the parts of all layers are stacked along a first axis, whose matrix it is: an
            integer array. None where they are not. A kernel reads a layer where it lies, while a
            slice that is handed to it is a copy.
        target: what the program is compiled for, which decides the body.
    """

    values: Any
    scales: Any = None
    minimums: Any = None
    quantizes_inputs: bool = field(default=False, metadata={"static": True})
    in_strips: bool = field(default=False, metadata={"static": True})
    layer: Any = None
    target: Target = field(default=CPU, metadata={"static": True})

    @property
    def is_packed(self) -> bool:
        return self.values.dtype == jnp.uint8 and not self.in_strips

    @property
    def num_rows(self) -> int:
        if self.in_strips:
            return self.values.shape[0 if self.layer is None else 1] * 16
        return self.values.shape[-2]

    @property
    def num_inputs(self) -> int:
        if self.in_strips:
            is_float = self.values.dtype == jnp.uint16
            return self.values.shape[-3] * 2 if is_float else self.values.shape[-4] * 32
        return self.values.shape[-1] * (2 if self.is_packed else 1)

    @property
    def num_groups(self) -> int:
        if self.scales is None:
            return 1
        return self.scales.shape[-2 if self.in_strips else -1]

    def alone(self) -> "QuantizedMatrix":
        """Returns the same matrix without the other layers'."""
        if self.layer is None:
            return self

        def own(part: Any) -> Any:
            if part is None:
                return None
            return jax.lax.dynamic_index_in_dim(part, self.layer, keepdims=False)

        return replace(
            self,
            values=own(self.values),
            scales=own(self.scales),
            minimums=own(self.minimums),
            layer=None,
        )
