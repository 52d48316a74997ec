"""Quantized matrices as AutoAWQ and AutoGPTQ store them: qweight, qzeros and scales, transposed.

Both keep `[in, out]` matrices of codes, 32-bit words of them, and a scale and a zero for each group
of inputs: a code stands for (code - zero) * scale. AWQ packs eight outputs in a word, in an order
of its own; GPTQ packs inputs in order, and writes zeros one too low, unless the file says gptq_v2.
Source: the modules WQLinear_GEMM of AutoAWQ 0.2 and QuantLinear of AutoGPTQ 0.7 and GPTQModel 2.
"""

import json
from functools import partial

import numpy as np

from pallasite.models.checkpoint_fields import Fields, shown
from pallasite.models.errors import CheckpointError
from pallasite.models.forms import Form
from pallasite.models.quantize import QuantizedTensor
from pallasite.models.stored_matrix import (
    INT32,
    SCALE_TYPES,
    Module,
    Raw,
    StoredMatrix,
    unpack,
    with_zeros,
    without_zeros,
)

# The nibble, from the lowest, that holds each of the eight outputs in a word of AWQ's.
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)

# Settings that change what the tensors mean, and the values that mean nothing.
_AWQ_NEUTRAL: dict[str, tuple[object, ...]] = {"version": ("gemm", "GEMM"), "zero_point": (True,)}
_GPTQ_NEUTRAL: dict[str, tuple[object, ...]] = {
    "checkpoint_format": ("gptq", "gptq_v2"),
    "dynamic": ({},),
    "is_marlin_format": (False,),
}


def find_awq(config: Fields, modules: list[Module]) -> dict[str, StoredMatrix]:
    """Returns the quantized matrices by module. Raises CheckpointError."""
    if config.integer("bits") != 4:
        raise config.error("bits", "AWQ checkpoints of 4 bits alone are supported")
    _require_neutral(config, _AWQ_NEUTRAL)
    group = _read_group(config)
    return {
        module.name: _find_awq(module, group) for module in modules if "qweight" in module.tensors
    }


def find_gptq(config: Fields, modules: list[Module]) -> dict[str, StoredMatrix]:
    """Returns the quantized matrices by module. Raises CheckpointError.

    A file whose groups are of inputs in another order than theirs (`desc_act`) is refused when
    such a matrix is built, by its g_idx: with a group for the whole row the order is of no matter.
    """
    num_bits = config.integer("bits")
    if num_bits not in (4, 8):
        raise config.error("bits", "GPTQ checkpoints of 4 and 8 bits are supported")
    _require_neutral(config, _GPTQ_NEUTRAL)
    group = _read_group(config)
    lift = 0 if config.values.get("checkpoint_format") == "gptq_v2" else 1
    return {
        module.name: _find_gptq(module, num_bits, group, lift)
        for module in modules
        if "qweight" in module.tensors
    }


def _require_neutral(config: Fields, neutral: dict[str, tuple[object, ...]]) -> None:
    for name, values in neutral.items():
        if config.has(name) and config.values[name] not in values:
            allowed = " or ".join(json.dumps(value) for value in values)
            raise config.error(name, f"only {allowed} is supported")


def _read_group(config: Fields) -> int | None:
    if config.values.get("group_size") == -1:
        return None
    group = config.integer("group_size")
    if group % 2:
        raise config.error("group_size", "it must be even, or -1 for the whole row")
    return group


def _find_awq(module: Module, group: int | None) -> StoredMatrix:
    parts = module.parts("qweight", "qzeros", "scales")
    num_inputs, num_words = module.shape("qweight", INT32)
    num_outputs = 8 * num_words
    group = _checked_group(module, num_inputs, group)
    num_groups = num_inputs // group
    module.require("qzeros", (num_groups, num_words), INT32)
    module.require("scales", (num_groups, num_outputs), *SCALE_TYPES)
    return StoredMatrix(
        shape=(num_outputs, num_inputs),
        form=Form(kind="int4", group=group),
        parts=parts,
        build=_build_awq,
    )


def _build_awq(raw: Raw) -> QuantizedTensor:
    return with_zeros(_unpack_awq(raw["qweight"]).T, raw["scales"].T, _unpack_awq(raw["qzeros"]).T)


def _unpack_awq(words: np.ndarray) -> np.ndarray:
    eights = unpack(words, 4).reshape(words.shape[0], -1, 8)
    return eights[..., _AWQ_NIBBLES].reshape(words.shape[0], -1)


def _find_gptq(module: Module, num_bits: int, group: int | None, lift: int) -> StoredMatrix:
    parts = module.parts("qweight", "qzeros", "scales", optional=["g_idx"])
    num_words, num_outputs = module.shape("qweight", INT32)
    num_inputs = num_words * 32 // num_bits
    group = _checked_group(module, num_inputs, group)
    num_groups = num_inputs // group
    module.require("scales", (num_groups, num_outputs), *SCALE_TYPES)
    if num_outputs * num_bits % 32:
        raise module.error("qweight", f"outputs must be a multiple of {32 // num_bits}")
    module.require("qzeros", (num_groups, num_outputs * num_bits // 32), INT32)
    if "g_idx" in parts:
        module.require("g_idx", (num_inputs,), INT32)
    is_whole_row = num_bits == 8 and num_groups == 1
    form = Form(kind="int4" if num_bits == 4 else "int8", group=None if is_whole_row else group)
    return StoredMatrix(
        shape=(num_outputs, num_inputs),
        form=form,
        parts=parts,
        build=partial(_build_gptq, module.name, num_bits, lift),
    )


def _build_gptq(name: str, num_bits: int, lift: int, raw: Raw) -> QuantizedTensor:
    codes = unpack(raw["qweight"].T, num_bits)
    zeros = unpack(raw["qzeros"], num_bits).T
    if num_bits == 4 and lift and (zeros == 15).any():
        raise CheckpointError(
            f"got a zero of 0 written as one too low in {shown(f'{name}.qzeros')}, which readers"
            " take for 0 or for 16, and which may have changed its neighbours; zeros must be"
            " unambiguous; save the model with checkpoint_format 'gptq_v2'"
        )
    zeros = zeros + np.uint8(lift)
    scales = raw["scales"].T
    if "g_idx" in raw:
        group = codes.shape[1] // scales.shape[1]
        if not np.array_equal(raw["g_idx"], np.arange(codes.shape[1]) // group):
            raise CheckpointError(
                f"got inputs in another order in {shown(f'{name}.g_idx')} (desc_act); the groups of"
                " a row must be of neighbours; quantize the model with desc_act=false"
            )
    if num_bits == 4:
        return with_zeros(codes, scales, zeros)
    if (zeros != 128).any():
        raise CheckpointError(
            f"got 8-bit zeros other than 128 in {shown(f'{name}.qzeros')}; 8-bit weights must be"
            " symmetric; quantize the model with sym=true"
        )
    return without_zeros(codes, scales)


def _checked_group(module: Module, num_inputs: int, group: int | None) -> int:
    group = group or num_inputs
    if num_inputs % group:
        raise module.error("qweight", f"its {num_inputs} inputs must be whole groups of {group}")
    return group
