"""From one stored tensor to a weight's arrays on the host: cut, laid out, in the weight's form."""

import numpy as np

from pallasite.models.errors import ConfigError
from pallasite.models.partition import Axis, Partition
from pallasite.models.quantize import QuantizedTensor, Stored, quantize
from pallasite.models.weights import Declared, Matrix, source_of


def lay_out(tensor: Stored, weight: Declared, partition: Partition) -> dict[str, np.ndarray]:
    """Returns the arrays of a weight, or of one of its layers, by the parts' names.

    Args:
        tensor: as the checkpoint has it, of the shape of the weight's source.
    """
    source = source_of(weight)
    axes = weight.axes if isinstance(weight, Matrix) else weight.get_metadata("axes")
    axes = axes[1:] if source.is_stacked else axes
    if source.rows is not None:
        tensor = _rows(tensor, *source.rows)
    layouts = [partition.axis(axis, size) for axis, size in zip(axes, tensor.shape, strict=True)]
    form = weight.form if isinstance(weight, Matrix) else None
    if isinstance(tensor, QuantizedTensor):
        if form is not None and tensor.has_form(form):
            return _parts(_lay_out_quantized(tensor, layouts, source.pattern_name))
        tensor = tensor.dequantize()
    for dim, layout in enumerate(layouts):
        tensor = layout.lay_out(tensor, dim)
    if form is None or not form.is_quantized:
        return {"values": tensor}
    return _parts(quantize(tensor, form))


def pack(values: np.ndarray, group: int) -> np.ndarray:
    """Packs 4-bit values `[out, in]` two in a byte, as `QuantizedMatrix` holds them."""
    halves = values.reshape(values.shape[0], -1, 2, group // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(values.shape[0], -1)


def unpack(packed: np.ndarray, group: int) -> np.ndarray:
    """Undoes `pack`."""
    halves = packed.reshape(packed.shape[0], -1, 1, group // 2)
    return np.concatenate((halves & 15, halves >> 4), axis=2).reshape(packed.shape[0], -1)


def _rows(tensor: Stored, start: int, stop: int) -> Stored:
    if isinstance(tensor, QuantizedTensor):
        minimums = None if tensor.minimums is None else tensor.minimums[start:stop]
        return QuantizedTensor(tensor.values[start:stop], tensor.scales[start:stop], minimums)
    return tensor[start:stop]


def _lay_out_quantized(tensor: QuantizedTensor, layouts: list[Axis], name: str) -> QuantizedTensor:
    """Lays out a quantized tensor without rounding it again: its groups move as they are."""
    rows, inputs = layouts
    arrays = [tensor.values, tensor.scales, tensor.minimums]
    if inputs.sources is not None:
        groups = _group_layout(inputs, tensor, name)
        arrays = [
            None if array is None else layout.lay_out(array, 1)
            for array, layout in zip(arrays, (inputs, groups, groups), strict=True)
        ]
    values, scales, minimums = (
        None if array is None else rows.lay_out(array, 0) for array in arrays
    )
    assert values is not None
    assert scales is not None
    return QuantizedTensor(values, scales, minimums)


def _group_layout(inputs: Axis, tensor: QuantizedTensor, name: str) -> Axis:
    """How a matrix's groups are laid out where its inputs are; each must stay whole."""
    num_groups = tensor.scales.shape[1]
    if num_groups == 1:
        return Axis(1)
    assert inputs.sources is not None
    sources = inputs.sources.reshape(-1, tensor.group)
    first = sources[:, :1]
    steps = np.arange(tensor.group)
    is_whole = np.where(first < 0, sources == first, sources == first + steps)
    if not is_whole.all() or (first[first >= 0] % tensor.group).any():
        raise ConfigError(
            f"got groups of {tensor.group} in {name}, which do not stay whole where heads are laid"
            " out for this mesh; a group must divide the head's width; choose another mesh, or a"
            " rule that gives this weight another form"
        )
    return Axis(len(first), np.where(first[:, 0] < 0, -1, first[:, 0] // tensor.group))


def _parts(tensor: QuantizedTensor) -> dict[str, np.ndarray]:
    if tensor.minimums is None:
        return {"values": tensor.values, "scales": tensor.scales}
    packed = pack(tensor.values, tensor.group)
    return {"values": packed, "scales": tensor.scales, "minimums": tensor.minimums}
