"""Checkpoints whose weights are quantized already: what is in the files, without rounding again.

`quantization_config` of config.json says which format the matrices are in. A reader of that format
finds the tensors of each one; here they become shapes, rules for forms and a way to read.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pallasite.models.checkpoint_awq_gptq import find_awq, find_gptq
from pallasite.models.checkpoint_compressed import find_compressed
from pallasite.models.checkpoint_fields import Fields, shown
from pallasite.models.checkpoint_pallasite import METHOD, find_pallasite
from pallasite.models.checkpoint_safetensors import FLOATS, SafeTensor
from pallasite.models.errors import CheckpointError
from pallasite.models.forms import Rule, pattern_name
from pallasite.models.stored_matrix import Module, StoredMatrix, modules_of

FORMATS: dict[str, Callable[[Fields, list[Module]], dict[str, StoredMatrix]]] = {
    "awq": find_awq,
    "gptq": find_gptq,
    "compressed-tensors": find_compressed,
    METHOD: find_pallasite,
}
"""By `quant_method`."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What a checkpoint's tensors mean.

    Attributes:
        shapes: those of the weights, `[out, in]` for a matrix, in the order of the files.
        matrices: the quantized ones, by their plain name, as in "lm_head.weight".
        rules: the form of each quantized weight, for `ModelConfig.stored_forms`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    matrices: Mapping[str, StoredMatrix]
    rules: tuple[Rule, ...]


def read_quantization(config: Fields, tensors: Mapping[str, SafeTensor]) -> Quantization:
    """Returns what the tensors of a folder mean.

    Args:
        config: all of config.json.
        tensors: all of the folder's, by name.

    Raises CheckpointError naming the setting or the tensor that is wrong or not supported.
    """
    found: dict[str, StoredMatrix] = {}
    modules = modules_of(tensors)
    if config.has("quantization_config"):
        settings = config.fields("quantization_config")
        method = settings.text("quant_method")
        if method not in FORMATS:
            raise settings.error("quant_method", f"supported are {', '.join(FORMATS)}")
        found = FORMATS[method](settings, modules)
        if not found:
            raise CheckpointError(
                f"got a {settings.source} of {shown(method)} and no quantized tensor; they must"
                " agree; fetch the checkpoint again"
            )
    matrices = {f"{name}.weight": matrix for name, matrix in found.items()}
    shapes = _shapes(tensors, matrices)
    return Quantization(shapes=shapes, matrices=matrices, rules=_rules(shapes, matrices))


def _shapes(
    tensors: Mapping[str, SafeTensor], matrices: Mapping[str, StoredMatrix]
) -> dict[str, tuple[int, ...]]:
    whole_of = {part: name for name, m in matrices.items() for part in m.parts.values()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        if name in whole_of:
            whole = whole_of[name]
            shapes[whole] = matrices[whole].shape
            continue
        if tensor.dtype not in FLOATS.values():
            raise CheckpointError(
                f"got tensor {shown(name)} of type {tensor.dtype}; what config.json does not say"
                f" is quantized must be {', '.join(FLOATS)}; convert the checkpoint"
            )
        if name in matrices:
            raise CheckpointError(
                f"got tensor {shown(name)} both plain and quantized; it must be there once; fetch"
                " the checkpoint again"
            )
        shapes[name] = tensor.shape
    return shapes


def _rules(
    shapes: Mapping[str, tuple[int, ...]], matrices: Mapping[str, StoredMatrix]
) -> tuple[Rule, ...]:
    """One rule a weight, over all layers: those are stacked, so that they must be of one form."""
    forms: dict[str, tuple[str, str]] = {}
    for name in shapes:
        pattern = pattern_name(name)
        form = str(matrices[name].form) if name in matrices else "floats"
        first, other = forms.setdefault(pattern, (form, name))
        if first != form:
            raise CheckpointError(
                f"got {shown(other)} in the form {first} and {shown(name)} in the form {form}; the"
                " layers of a weight must be of one form; quantize the model with the same settings"
                " for all layers"
            )
    return tuple(
        (f"^{re.escape(pattern)}$", form)
        for pattern, (form, _) in forms.items()
        if form != "floats"
    )
