"""Settings and matrices of each quantized format that is read, for the tests of its readers."""

from dataclasses import replace

import ml_dtypes
import numpy as np

from tests.models.quantized_files import (
    Codes,
    awq_parts,
    gptq_parts,
    packed_parts,
)

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
UP = "model.layers.1.mlp.up_proj"


def weights(num_bits: int, group: int | None, **changes: object) -> dict[str, object]:
    stated = {"num_bits": num_bits, "type": "int", "symmetric": True, "dynamic": False}
    stated |= {"strategy": "channel"} if group is None else {"strategy": "group"}
    return stated | {"group_size": group} | changes


def compressed(
    storage: str, weights: dict[str, object], inputs: dict[str, object] | None = None
) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
GROUPS = TOKEN | {"strategy": "group", "group_size": 32}

# Settings; group, zeros and bits of the codes; how they are written; the form they are held in.
# "{in}" is the width of the matrix.
CASES = {
    "awq": (AWQ, (32, range(16), 4), awq_parts, "int4:32"),
    "awq groups of 64": (AWQ | {"group_size": 64}, (64, range(16), 4), awq_parts, "int4:64"),
    "gptq": (GPTQ, (32, range(1, 16), 4), gptq_parts, "int4:32"),
    "gptq whole rows": (
        GPTQ | {"group_size": -1, "desc_act": True},
        (None, range(8, 9), 4),
        gptq_parts,
        "int4:{in}",
    ),
    "gptq_v2": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        (32, range(16), 4),
        lambda matrix: gptq_parts(matrix, lowered=0),
        "int4:32",
    ),
    "gptq of 8 bits": (
        GPTQ | {"bits": 8},
        (32, range(128, 129), 8),
        lambda matrix: gptq_parts(matrix, num_bits=8),
        "int8:32",
    ),
    "gptq of 8 bits, whole rows": (
        GPTQ | {"bits": 8, "group_size": -1},
        (None, range(128, 129), 8),
        lambda matrix: gptq_parts(matrix, num_bits=8),
        "int8",
    ),
    "packed, symmetric": (
        compressed("pack-quantized", weights(4, 32)),
        (32, range(8, 9), 4),
        packed_parts,
        "int4:32",
    ),
    "packed, asymmetric": (
        compressed("pack-quantized", weights(4, 64, symmetric=False)),
        (64, range(16), 4),
        lambda matrix: packed_parts(matrix, has_zeros=True),
        "int4:64",
    ),
    "packed, whole rows": (
        compressed("pack-quantized", weights(4, None)),
        (None, range(8, 9), 4),
        packed_parts,
        "int4:{in}",
    ),
    "packed, 8 bits": (
        compressed("pack-quantized", weights(8, None)),
        (None, range(128, 129), 8),
        lambda matrix: packed_parts(matrix, num_bits=8),
        "int8",
    ),
    "int8": (
        compressed("int-quantized", weights(8, None)),
        (None, range(128, 129), 8),
        lambda matrix: int8_parts(matrix),
        "int8",
    ),
    "int8 groups": (
        compressed("int-quantized", weights(8, 32)),
        (32, range(128, 129), 8),
        lambda matrix: int8_parts(matrix),
        "int8:32",
    ),
    "w8a8": (
        compressed("int-quantized", weights(8, None), TOKEN),
        (None, range(128, 129), 8),
        lambda matrix: int8_parts(matrix),
        "w8a8",
    ),
    "w8a8 groups": (
        compressed("int-quantized", weights(8, 32), GROUPS),
        (32, range(128, 129), 8),
        lambda matrix: int8_parts(matrix),
        "w8a8:32",
    ),
}


def int8_parts(matrix: Codes) -> dict[str, np.ndarray]:
    return {
        "weight": (matrix.codes - 128).astype(np.int8),
        "weight_scale": matrix.scales.astype(ml_dtypes.bfloat16),
    }


def expected_values(matrix: Codes, form: str) -> np.ndarray:
    """The numbers that the codes are, and the scales as they were written."""
    return matrix.codes if form.startswith("int4") else matrix.codes - 128


def as_written(matrix: Codes, write) -> Codes:
    return (
        replace(matrix, scales=matrix.scales.astype(ml_dtypes.bfloat16).astype(np.float16))
        if ("weight" in write(matrix))
        else matrix
    )
