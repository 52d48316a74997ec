"""Quantized checkpoints of tiny models, written word by word from the formats' definitions.

It shares nothing with the readers. Weights are random codes, not rounded floats: what is read back
must be the codes, whatever they are.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pallasite.models.config import ModelConfig
from tests.tiny_checkpoints import hf_config, random_tensors, write_hf, write_json

# Which output the nibbles of a word hold, from the lowest: AutoAWQ's order_map for 4 bits.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Codes:
    """A matrix `[out, in]`: (codes - zeros) * scales, a zero and a scale for each group."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        """f64 `[out, in]`."""
        group = self.codes.shape[1] // self.scales.shape[1]
        zeros, scales = (np.repeat(x, group, axis=1) for x in (self.zeros, self.scales))
        return (self.codes.astype(np.float64) - zeros) * scales.astype(np.float64)


def random_codes(
    rng: np.random.Generator, shape: tuple[int, int], group: int, zeros: range, num_bits: int = 4
) -> Codes:
    """Returns codes of every size, zeros in a range, and scales of float16."""
    num_groups = shape[1] // group
    return Codes(
        rng.integers(2**num_bits, size=shape),
        rng.integers(zeros.start, zeros.stop, (shape[0], num_groups)),
        rng.uniform(1e-3, 1e-2, (shape[0], num_groups)).astype(np.float16),
    )


def words(fields: np.ndarray, num_bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Packs `[rows, n]` along the rows: field order[i] of a word has its bits i * num_bits up."""
    per_word = 32 // num_bits
    order = order or tuple(range(per_word))
    rows = []
    for row in fields.tolist():
        row += [0] * (-len(row) % per_word)
        packed = []
        for start in range(0, len(row), per_word):
            word = 0
            for position, field in enumerate(order):
                word |= row[start + field] << (num_bits * position)
            packed.append(word - 2**32 if word >= 2**31 else word)
        rows.append(packed)
    return np.array(rows, np.int64).astype(np.int32)


def awq_parts(matrix: Codes) -> dict[str, np.ndarray]:
    return {
        "qweight": words(matrix.codes.T, 4, AWQ_ORDER),
        "qzeros": words(matrix.zeros.T, 4, AWQ_ORDER),
        "scales": matrix.scales.T.copy(),
    }


def gptq_parts(matrix: Codes, num_bits: int = 4, lowered: int = 1) -> dict[str, np.ndarray]:
    num_inputs = matrix.codes.shape[1]
    group = num_inputs // matrix.scales.shape[1]
    return {
        "qweight": words(matrix.codes, num_bits).T.copy(),
        "qzeros": words(matrix.zeros.T - lowered, num_bits),
        "scales": matrix.scales.T.copy(),
        "g_idx": (np.arange(num_inputs) // group).astype(np.int32),
    }


def packed_parts(
    matrix: Codes, num_bits: int = 4, has_zeros: bool = False
) -> dict[str, np.ndarray]:
    parts = {
        "weight_packed": words(matrix.codes, num_bits),
        "weight_scale": matrix.scales,
        "weight_shape": np.array(matrix.codes.shape, np.int64),
    }
    if has_zeros:
        parts["weight_zero_point"] = words(matrix.zeros.T, num_bits).T.copy()
    return parts


def is_projection(name: str) -> bool:
    return name.startswith("model.layers.") and "_proj" in name


def random_matrices(
    rng: np.random.Generator, config: ModelConfig, group: int | None, zeros: range, num_bits: int
) -> dict[str, Codes]:
    """Returns codes for each projection of the layers, by module."""
    shapes = {name: tensor.shape for name, tensor in random_tensors(config).items()}
    return {
        name.removesuffix(".weight"): random_codes(rng, shape, group or shape[1], zeros, num_bits)
        for name, shape in shapes.items()
        if is_projection(name)
    }


def write_quantized(
    folder: Path,
    config: ModelConfig,
    settings: dict[str, object],
    parts: dict[str, dict[str, np.ndarray]],
) -> Path:
    """Writes a folder whose matrices are the parts, by module; the rest is random floats."""
    floats = random_tensors(config, seed=3)
    plain = {
        name: tensor for name, tensor in floats.items() if name.removesuffix(".weight") not in parts
    }
    raw = {
        f"{module}.{part}": array
        for module, arrays in parts.items()
        for part, array in arrays.items()
    }
    write_hf(folder, config, plain)
    save_file(plain | raw, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", hf_config(config) | {"quantization_config": settings})
    return folder
