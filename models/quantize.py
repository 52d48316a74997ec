"""Quantized matrices on the host, and how floats become one."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from pallasite.models.forms import Form


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix `[out, in]` of small numbers with a scale for each group of a row.

    Attributes:
        values: int8 in -127..127, uint8 in 0..15, or float8_e4m3fn; `[out, in]`.
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

    def dequantize(self) -> np.ndarray:
        """Returns f32 `[out, in]`."""
        values = self.values.astype(np.float32).reshape(*self.scales.shape, -1)
        values = values * self.scales[..., None]
        if self.minimums is not None:
            values = values + self.minimums[..., None]
        return values.reshape(self.shape)


def quantize(weight: np.ndarray, form: Form) -> QuantizedTensor:
    """Rounds f32 `[out, in]` to a quantized form."""
    num_rows, num_inputs = weight.shape
    groups = weight.reshape(num_rows, -1, form.group or num_inputs).astype(np.float32)
    if form.kind == "int4":
        low, high = groups.min(-1), groups.max(-1)
        scales = np.where(high > low, (high - low) / 15, 1).astype(np.float32)
        values = np.clip(np.round((groups - low[..., None]) / scales[..., None]), 0, 15)
        return QuantizedTensor(values.astype(np.uint8).reshape(weight.shape), scales, low)
    limit = {"int8": 127.0, "fp8": 448.0}[form.kind]
    largest = np.abs(groups).max(-1)
    scales = np.where(largest > 0, largest / limit, 1).astype(np.float32)
    values = groups / scales[..., None]
    if form.kind == "int8":
        values = np.round(values).astype(np.int8)
    return QuantizedTensor(
        values.astype(ml_dtypes.float8_e4m3fn if form.kind == "fp8" else np.int8).reshape(
            weight.shape
        ),
        scales,
    )
