"""Quantized matrices on the host, and how floats become one: the definition of the stored forms.

Rounding is to the nearest of the numbers that a form has, with the smallest scale at which a
group's largest weight is still one of them. `make models` measures what that costs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pallasite.models.checkpoint_bytes import FLOAT8
from pallasite.models.errors import ConfigError
from pallasite.models.forms import Form

# Weights rounded at a time: their temporaries stay in a processor's cache.
_BLOCK_SIZE = 1 << 18

_SMALLEST_SCALE = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix `[out, in]` of small numbers with a scale for each group of a row.

    Attributes:
        values: int8, uint8 in 0..15, or float8_e4m3fn; `[out, in]`. Of int8, -128 is never
            ours, but some checkpoints have it.
        scales: f32 `[out, groups]`.
        minimums: f32 `[out, groups]` beside 4-bit values: v stands for v * scale + minimum.
    """

    values: np.ndarray
    scales: np.ndarray
    minimums: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def group(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "QuantizedTensor":
        """Returns the tensor with each of its arrays changed."""
        minimums = None if self.minimums is None else change(self.minimums)
        return QuantizedTensor(change(self.values), change(self.scales), minimums)

    def has_form(self, form: Form) -> bool:
        """Returns whether this is what the form holds, so that nothing has to be rounded again."""
        kind = {np.dtype(np.uint8): "int4", np.dtype(np.int8): "int8"}.get(self.values.dtype, "fp8")
        if kind != form.kind or self.group != (form.group or self.shape[1]):
            return False
        return not form.has_half_scales or all(
            numbers is None or (as_halves(numbers) == numbers).all()
            for numbers in (self.scales, self.minimums)
        )

    def dequantize(self) -> np.ndarray:
        """Returns f32 `[out, in]`."""
        values = self.values.astype(np.float32).reshape(*self.scales.shape, -1)
        values *= self.scales[..., None]
        if self.minimums is not None:
            values += self.minimums[..., None]
        return values.reshape(self.shape)


def as_halves(numbers: np.ndarray) -> np.ndarray:
    """Rounds to float16, and returns f32; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return numbers.astype(np.float16).astype(np.float32)


Stored = np.ndarray | QuantizedTensor
"""A tensor as a checkpoint has it."""


def quantize(weight: np.ndarray, form: Form) -> QuantizedTensor:
    """Rounds finite floats `[out, in]` to a quantized form.

    With s the scale of a weight's group, and apart from f32's own rounding, the error is at most
    s / 2 for int8, with s = max |w| / 127 over the group; s / 2 for int4, with s = (max w - min w)
    / 15; and for fp8, with s = max |w| / 448, the larger of |w| / 16 and s / 1024. A group whose
    scale would lie below f32's normal numbers becomes its minimum for int4, and else zeros. Scales
    and minimums that are to be of float16 are rounded first, which adds up to 2**-11 of each.

    Raises ConfigError where the form's group does not divide the rows, and where float16 has no
    number for a scale.
    """
    num_rows, num_inputs = weight.shape
    group = checked_group(num_inputs, form)
    dtype = {"int4": np.dtype(np.uint8), "int8": np.dtype(np.int8), "fp8": FLOAT8}[form.kind]
    values = np.empty(weight.shape, dtype)
    scales = np.empty((num_rows, num_inputs // group), np.float32)
    minimums = np.empty_like(scales) if form.kind == "int4" else None
    for rows in _blocks(num_rows, num_inputs):
        # A copy, which is then worked on in place.
        groups = np.array(weight[rows], np.float32).reshape(-1, num_inputs // group, group)
        if form.has_half_scales:
            scales[rows], lows = _scale_by_halves(groups, minimums is not None)
            if minimums is not None:
                minimums[rows] = lows
        elif minimums is not None:
            scales[rows], minimums[rows] = _scale_to_codes(groups)
        else:
            scales[rows] = _scale_to(448.0 if form.kind == "fp8" else 127.0, groups)
        if form.kind != "fp8":
            np.rint(groups, out=groups)
        values[rows] = groups.reshape(-1, num_inputs)
    return QuantizedTensor(values, scales, minimums)


def rounded(tensor: Stored, form: Form) -> QuantizedTensor:
    """Returns a matrix in a quantized form: as it is where it has that form, else rounded to it."""
    if isinstance(tensor, QuantizedTensor):
        return tensor if tensor.has_form(form) else quantize(tensor.dequantize(), form)
    return quantize(tensor, form)


def checked_group(num_inputs: int, form: Form) -> int:
    """Returns the group of a row of `num_inputs`. Raises ConfigError where it does not divide."""
    group = num_inputs if form.group is None else form.group
    if num_inputs % group:
        fitting = [str(g) for g in range(16, 513, 2) if num_inputs % g == 0]
        raise ConfigError(
            f"got the form {form} for a weight with rows of {num_inputs}; a group must divide"
            f" them, as {', '.join(fitting) if fitting else 'only the whole row'} would; choose"
            " another group"
        )
    return group


def _blocks(num_rows: int, num_inputs: int) -> Iterator[slice]:
    step = max(1, _BLOCK_SIZE // num_inputs)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _scale_to(limit: float, groups: np.ndarray) -> np.ndarray:
    """Divides `[rows, groups, group]` in place so that -limit..limit holds it; returns scales."""
    scales = np.maximum(groups.max(-1), -groups.min(-1)) / np.float32(limit)
    is_zero = scales < _SMALLEST_SCALE
    scales[is_zero] = 1
    groups[is_zero] = 0
    groups /= scales[..., None]
    return scales


def _scale_to_codes(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns `[rows, groups, group]` in place into 0..15; returns scales and minimums."""
    minimums = groups.min(-1)
    # Halves: the difference of two large numbers may be beyond f32, that of their halves is not.
    half = np.float32(0.5)
    scales = (groups.max(-1) * half - minimums * half) / np.float32(7.5)
    is_flat = scales < _SMALLEST_SCALE
    scales[is_flat] = 1
    groups *= half
    groups -= (minimums * half)[..., None]
    groups[is_flat] = 0
    groups /= (scales * half)[..., None]
    return scales, minimums


def _scale_by_halves(groups: np.ndarray, has_minimums: bool) -> tuple[np.ndarray, np.ndarray]:
    """Turns groups in place into 0..15 or -127..127, with scales and minimums of float16."""
    low, high = groups.min(-1), groups.max(-1)
    minimums = as_halves(low) if has_minimums else np.zeros_like(low)
    scales = as_halves((high - low) / 15 if has_minimums else np.maximum(high, -low) / 127)
    if not (np.isfinite(scales).all() and np.isfinite(minimums).all()):
        raise ConfigError(
            f"got weights from {low.min():g} to {high.max():g}; q4_1 and q8_0 have scales of"
            " float16, up to 65,504; choose another form"
        )
    is_flat = scales == 0
    scales[is_flat] = 1
    groups -= minimums[..., None]
    groups[is_flat] = 0
    groups /= scales[..., None]
    # A scale that was rounded down leaves the largest just beyond.
    np.clip(groups, *((0, 15) if has_minimums else (-127, 127)), out=groups)
    return scales, minimums
