"""Quantized matrices as we store them ourselves: a matrix's parts as the products' op takes them.

`quantization_config` is {"quant_method": "pallasite", "forms": {name: form}}, where names have "*"
for the layer's number, as in models/forms.py. A matrix NAME has NAME.weight, int8 or fp8
`[out, in]` or two 4-bit values in a byte `[out, in / 2]`; NAME.weight_scales, f32 `[out, groups]`;
and beside 4-bit values NAME.weight_minimums, the same. Other formats have no such minimum.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np

from pallasite.models.checkpoint_bytes import FLOAT8, FLOAT32
from pallasite.models.checkpoint_fields import Fields
from pallasite.models.errors import ConfigError
from pallasite.models.forms import Form, parse_form, pattern_name
from pallasite.models.host_layout import pack, unpack
from pallasite.models.quantize import QuantizedTensor
from pallasite.models.stored_matrix import Module, Raw, StoredMatrix

METHOD = "pallasite"

_TYPES = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8), "fp8": FLOAT8}


def pallasite_settings(forms: Mapping[str, Form]) -> dict[str, object]:
    """Returns the quantization_config of a checkpoint with these forms, by `pattern_name`."""
    return {
        "quant_method": METHOD,
        "forms": {name: str(form) for name, form in forms.items()},
    }


def pallasite_parts(tensor: QuantizedTensor) -> dict[str, np.ndarray]:
    """Returns the tensors that a matrix is stored as, by part."""
    if tensor.minimums is None:
        return {"weight": tensor.values, "weight_scales": tensor.scales}
    return {
        "weight": pack(tensor.values, tensor.group),
        "weight_scales": tensor.scales,
        "weight_minimums": tensor.minimums,
    }


def find_pallasite(config: Fields, modules: list[Module]) -> dict[str, StoredMatrix]:
    """Returns the quantized matrices by module. Raises CheckpointError."""
    forms = config.fields("forms")
    return {
        module.name: _find(module, _read_form(forms, module.name))
        for module in modules
        if "weight_scales" in module.tensors
    }


def _read_form(forms: Fields, name: str) -> Form:
    key = pattern_name(name)
    text = forms.text(key)
    try:
        form = parse_form(text)
    except ConfigError:
        form = None
    if form is None or not form.is_quantized:
        raise forms.error(key, "it must be a quantized form, as in int8 or int4:32")
    return form


def _find(module: Module, form: Form) -> StoredMatrix:
    is_packed = form.kind == "int4"
    parts = module.parts("weight", "weight_scales", *(["weight_minimums"] if is_packed else []))
    num_outputs, width = module.shape("weight", _TYPES[form.kind])
    num_inputs = width * 2 if is_packed else width
    group = form.group or num_inputs
    if num_inputs % group:
        raise module.error("weight", f"its {num_inputs} inputs must be whole groups of {group}")
    for part in parts:
        if part != "weight":
            module.require(part, (num_outputs, num_inputs // group), FLOAT32)
    return StoredMatrix(
        shape=(num_outputs, num_inputs),
        form=form,
        parts=parts,
        build=partial(_build, group),
    )


def _build(group: int, raw: Raw) -> QuantizedTensor:
    if "weight_minimums" not in raw:
        return QuantizedTensor(raw["weight"], raw["weight_scales"])
    return QuantizedTensor(
        unpack(raw["weight"], group), raw["weight_scales"], raw["weight_minimums"]
    )
