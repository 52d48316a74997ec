"""Quantized matrices as compressed-tensors stores them, the format of llm-compressor and vLLM.

config.json has groups of modules; each says how many bits weights have, how many neighbours share a
scale, and whether inputs are rounded too. Matrices are `[out, in]`: weight_packed has small
integers along the inputs in int32 words, and weight has int8 or fp8; weight_scale stands beside.
Source: compressed-tensors 0.13, its QuantizationConfig and its compressors.
"""

import re
from dataclasses import dataclass
from functools import partial

import numpy as np

from pallasite.models.checkpoint_bytes import FLOAT8
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

_INT8 = np.dtype(np.int8)
_SIZE_TYPES = (np.dtype(np.int64), INT32)

# The bits and the type of weights that each format may hold.
_FORMATS = {
    "pack-quantized": ((4, "int"), (8, "int")),
    "int-quantized": ((8, "int"),),
    "float-quantized": ((8, "float"),),
    "naive-quantized": ((8, "int"), (8, "float")),
}

_MAX_PATTERN = 200
_PATTERN = re.compile(r"[\w.*+?|()\\^$:-]*")


@dataclass(frozen=True, kw_only=True)
class _Scheme:
    """How the weights of one group of modules are stored.

    Attributes:
        targets: names of modules, patterns after "re:", or "Linear" for all.
        group: inputs that share a scale, None for the whole row.
    """

    targets: tuple[str, ...]
    is_packed: bool
    kind: str
    num_bits: int
    group: int | None
    is_symmetric: bool
    quantizes_inputs: bool


def find_compressed(config: Fields, modules: list[Module]) -> dict[str, StoredMatrix]:
    """Returns the quantized matrices by module. Raises CheckpointError.

    Which modules are quantized is told by their tensors, so that the list of those that are not
    ("ignore") says nothing more.
    """
    if config.text("quantization_status", "compressed") != "compressed":
        raise config.error("quantization_status", "only 'compressed' is supported")
    for name in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if config.has(name) and config.values[name] != {}:
            raise config.error(name, "it is not supported; it must be absent or empty")
    groups = config.fields("config_groups")
    schemes = [_read_scheme(groups.fields(name), config) for name in groups.values]
    if not schemes:
        raise config.error("config_groups", "it must have a group")
    return {
        module.name: _find(module, _scheme_of(module, schemes))
        for module in modules
        if "weight_packed" in module.tensors or "weight_scale" in module.tensors
    }


def _read_scheme(fields: Fields, config: Fields) -> _Scheme:
    if not fields.has("weights"):
        raise fields.error("weights", "it must be an object; modules without are not supported")
    weights = fields.fields("weights")
    source = fields if fields.has("format") else config
    format_name = source.text("format")
    if format_name not in _FORMATS:
        raise source.error("format", f"supported are {', '.join(_FORMATS)}")
    bits, kind = weights.integer("num_bits", 8), weights.text("type", "int").lower()
    if (bits, kind) not in _FORMATS[format_name]:
        allowed = " or ".join(f"{bits} with type {kind!r}" for bits, kind in _FORMATS[format_name])
        raise weights.error("num_bits", f"in the format {format_name!r} it must be {allowed}")
    if weights.flag("dynamic", False):
        raise weights.error("dynamic", "it must be false for weights")
    if weights.has("actorder") and weights.values["actorder"] not in ("weight", "static", False):
        raise weights.error("actorder", "groups must be of neighbours: null, or 'weight'")
    group = _read_group(weights)
    is_symmetric = weights.flag("symmetric", True)
    if bits == 8 and not is_symmetric:
        raise weights.error("symmetric", "it must be true for weights of 8 bits")
    if fields.has("output_activations"):
        raise fields.error("output_activations", "it is not supported; it must be null")
    has_inputs = fields.has("input_activations")
    if has_inputs:
        if (bits, kind) != (8, "int"):
            raise fields.error("input_activations", "it must be null but for int8 weights")
        _check_inputs(fields.fields("input_activations"), group)
    return _Scheme(
        targets=_read_targets(fields),
        is_packed=format_name == "pack-quantized",
        kind=kind,
        num_bits=bits,
        group=group,
        is_symmetric=is_symmetric,
        quantizes_inputs=has_inputs,
    )


def _read_group(weights: Fields) -> int | None:
    is_row = weights.values.get("group_size") == -1 or not weights.has("group_size")
    strategy = weights.text("strategy", "channel" if is_row else "group")
    if strategy == "channel":
        return None
    if strategy != "group":
        raise weights.error("strategy", "supported are 'channel' and 'group'")
    group = weights.integer("group_size")
    if group % 2:
        raise weights.error("group_size", "it must be even")
    return group


def _check_inputs(inputs: Fields, group: int | None) -> None:
    """Raises CheckpointError unless inputs are rounded as the form w8a8 does it."""
    expected: dict[str, object] = {"num_bits": 8, "type": "int", "symmetric": True}
    expected |= {"dynamic": True, "strategy": "token" if group is None else "group"}
    if group is not None:
        expected["group_size"] = group
    for name, value in expected.items():
        found = inputs.values.get(name)
        if found != value or type(found) is not type(value):
            raise inputs.error(name, f"beside weights like these it must be {shown(value)}")


def _read_targets(fields: Fields) -> tuple[str, ...]:
    targets = fields.values.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise fields.error("targets", "it must be a list of strings")
    for target in targets:
        if target.startswith("re:") and not _is_harmless(target[3:]):
            raise CheckpointError(
                f"got the target {shown(target)} in {fields.source}; a pattern must be a regular"
                f" expression of at most {_MAX_PATTERN} letters, with few repeats and none of a"
                " part in brackets; write the modules' names out"
            )
    return tuple(targets)


def _is_harmless(pattern: str) -> bool:
    """Whether matching a name takes a bounded time. The file's author may not be the operator's
    friend, and Python's matcher takes exponential time for some patterns."""
    plain = re.sub(r"\\.", "x", pattern)
    if len(pattern) > _MAX_PATTERN or not _PATTERN.fullmatch(pattern):
        return False
    if re.search(r"\)[*+?]", plain) or len(re.findall(r"[*+?]", plain)) > 4:
        return False
    if plain.count("|") > 8:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _scheme_of(module: Module, schemes: list[_Scheme]) -> _Scheme:
    """The scheme that names a module most closely: by its name, by a pattern, by its class."""
    if len(schemes) == 1:
        return schemes[0]
    tests = (
        lambda target: target == module.name,
        lambda target: target.startswith("re:") and re.match(target[3:], module.name),
        lambda target: target == "Linear",
    )
    for test in tests:
        for scheme in schemes:
            if any(test(target) for target in scheme.targets):
                return scheme
    raise CheckpointError(
        f"got the quantized module {shown(module.name)}, which no group of config_groups has among"
        " its targets; one must say how it is stored; mend config.json"
    )


def _find(module: Module, scheme: _Scheme) -> StoredMatrix:
    if scheme.is_packed:
        return _find_packed(module, scheme)
    parts = module.parts("weight", "weight_scale")
    shape = module.shape("weight", FLOAT8 if scheme.kind == "float" else _INT8)
    group = _check_scales(module, shape, scheme.group)
    if scheme.kind == "float":
        if group is not None:
            raise module.error("weight_scale", "fp8 weights must have a scale a row")
        form = Form(kind="fp8")
    else:
        form = Form(kind="int8", group=group, quantizes_inputs=scheme.quantizes_inputs)
    return StoredMatrix(shape=shape, form=form, parts=parts, build=_build_plain)


def _find_packed(module: Module, scheme: _Scheme) -> StoredMatrix:
    zeros = [] if scheme.is_symmetric else ["weight_zero_point"]
    parts = module.parts("weight_packed", "weight_scale", "weight_shape", *zeros)
    num_outputs, num_words = module.shape("weight_packed", INT32)
    shape = (num_outputs, num_words * 32 // scheme.num_bits)
    module.require("weight_shape", (2,), *_SIZE_TYPES)
    group = _check_scales(module, shape, scheme.group)
    if zeros:
        num_groups = 1 if group is None else shape[1] // group
        num_rows = -(-num_outputs * scheme.num_bits // 32)
        module.require("weight_zero_point", (num_rows, num_groups), INT32)
    if scheme.num_bits == 4:
        form = Form(kind="int4", group=group or shape[1])
    else:
        form = Form(kind="int8", group=group, quantizes_inputs=scheme.quantizes_inputs)
    return StoredMatrix(
        shape=shape,
        form=form,
        parts=parts,
        build=partial(_build_packed, module.name, shape, scheme.num_bits),
    )


def _check_scales(module: Module, shape: tuple[int, int], group: int | None) -> int | None:
    """Checks the scales' shape; returns the group, None for the whole row."""
    num_outputs, num_inputs = shape
    width = group or num_inputs
    if num_inputs % width:
        part = "weight_packed" if "weight_packed" in module.tensors else "weight"
        raise module.error(part, f"its {num_inputs} inputs must be whole groups of {width}")
    module.require("weight_scale", (num_outputs, num_inputs // width), *SCALE_TYPES)
    return group


def _build_plain(raw: Raw) -> QuantizedTensor:
    return QuantizedTensor(raw["weight"], raw["weight_scale"].astype(np.float32))


def _build_packed(name: str, shape: tuple[int, int], num_bits: int, raw: Raw) -> QuantizedTensor:
    if raw["weight_shape"].tolist() != list(shape):
        raise CheckpointError(
            f"got {raw['weight_shape'].tolist()} in tensor {shown(f'{name}.weight_shape')}; the"
            f" packed weights beside it have {list(shape)}; fetch the checkpoint again"
        )
    codes, scales = unpack(raw["weight_packed"], num_bits), raw["weight_scale"]
    if num_bits == 8:
        return without_zeros(codes, scales)
    zeros = np.full(scales.shape, 8, np.uint8)
    if "weight_zero_point" in raw:
        zeros = unpack(raw["weight_zero_point"].T, 4).T[: shape[0]]
    return with_zeros(codes, scales, zeros)
