"""What compressed-tensors' config.json says of matrices that are int8 or fp8, and their parts.

4-bit values with a float minimum have no place in that format: see checkpoint_pallasite.py. Source:
compressed-tensors 0.13, as in checkpoint_compressed.py, which reads this.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from pallasite.models.forms import Form
from pallasite.models.quantize import QuantizedTensor

# 8-bit values in a word.
_PER_WORD = 4


def can_hold(form: Form, num_inputs: int) -> bool:
    """Returns whether compressed-tensors can hold what `quantize` makes of a matrix."""
    if _is_packed(form):
        return num_inputs % _PER_WORD == 0
    return form.kind in ("int8", "fp8")


def compressed_settings(forms: Mapping[str, Form], others: Iterable[str]) -> dict[str, object]:
    """Returns the quantization_config of a checkpoint with these forms.

    Args:
        forms: of the quantized matrices, by `pattern_name`.
        others: the matrices that are not quantized, likewise.
    """
    by_form: dict[Form, list[str]] = {}
    for name, form in forms.items():
        by_form.setdefault(form, []).append(name)
    groups = {
        f"group_{index}": _group(form, names) for index, (form, names) in enumerate(by_form.items())
    }
    formats = {str(group["format"]) for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [_target(name) for name in others],
        "kv_cache_scheme": None,
    }


def compressed_parts(tensor: QuantizedTensor, form: Form) -> dict[str, np.ndarray]:
    """Returns the tensors that a matrix is stored as, by part."""
    if not _is_packed(form):
        return {"weight": tensor.values, "weight_scale": tensor.scales}
    return {
        "weight_packed": (tensor.values.view(np.uint8) ^ np.uint8(0x80)).view("<i4"),
        "weight_scale": tensor.scales,
        "weight_shape": np.array(tensor.shape, np.int64),
    }


def _is_packed(form: Form) -> bool:
    """Whether integers stand four in a word, as other engines want them beside float inputs."""
    return form.kind == "int8" and not form.quantizes_inputs


def _group(form: Form, names: list[str]) -> dict[str, object]:
    is_float = form.kind == "fp8"
    integers = "pack-quantized" if _is_packed(form) else "int-quantized"
    strategy = {"strategy": "channel"} if form.group is None else {"strategy": "group"}
    shared: dict[str, object] = {
        "num_bits": 8,
        "type": "float" if is_float else "int",
        "symmetric": True,
    }
    shared |= {"group_size": form.group}
    weights = {**shared, **strategy, "dynamic": False}
    inputs = {**shared, "strategy": "token", "dynamic": True}
    if form.group is not None:
        inputs["strategy"] = "group"
    return {
        "targets": [_target(name) for name in names],
        "weights": weights,
        "input_activations": inputs if form.quantizes_inputs else None,
        "output_activations": None,
        "format": "float-quantized" if is_float else integers,
    }


def _target(name: str) -> str:
    """A module's name, or a pattern of those of all layers."""
    if "*" not in name:
        return name
    return "re:^" + re.escape(name).replace(r"\*", r"\d+") + "$"
