"""From one stored tensor to a weight's arrays on the host: cut, laid out, in the weight's form."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pallasite.models.checkpoint_bytes import BFLOAT16
from pallasite.models.errors import ConfigError
from pallasite.models.forms import Form
from pallasite.models.partition import Axis, Partition
from pallasite.models.quantize import QuantizedTensor, Stored, rounded
from pallasite.models.sharding import MODEL_AXIS, RULES
from pallasite.models.weights import Declared, Matrix, source_of
from pallasite.pallas_kernels.quantized_matmul import strips

# Values made on the host at a time, where they are not the stored tensor's own memory.
_PIECE_SIZE = 4 << 20


@dataclass(frozen=True)
class Piece:
    """Some rows of a weight, or of one of its layers: the same ones of every device's part.

    Attributes:
        first_row: of a device's part; of a matrix in strips, its first strip.
        arrays: by the parts' names; the rows of one device after those of another.
    """

    first_row: int
    arrays: dict[str, np.ndarray]


def lay_out(tensor: Stored, weight: Declared, partition: Partition) -> Iterator[Piece]:
    """Yields a weight, or one of its layers, in pieces: the host never holds it a second time.

    A weight that the tensor's own memory can serve as is one piece.

    Args:
        tensor: as the checkpoint has it, of the shape of the weight's source.
    """
    source = source_of(weight)
    axes = weight.axes if isinstance(weight, Matrix) else weight.get_metadata("axes")
    axes = axes[1:] if source.is_stacked else axes
    if source.rows is not None:
        tensor = _rows(tensor, slice(*source.rows))
    rows, *inputs = (partition.axis(axis, n) for axis, n in zip(axes, tensor.shape, strict=True))
    num_values = math.prod(axis.size for axis in (rows, *inputs))
    if num_values <= _PIECE_SIZE or _is_held_as_stored(tensor, weight, [rows, *inputs]):
        yield Piece(0, _arrays(tensor, weight, [rows, *inputs]))
        return
    num_parts = partition.num_parts if RULES[axes[0]] == MODEL_AXIS else 1
    sources = np.arange(rows.size) if rows.sources is None else rows.sources
    by_part = sources.reshape(num_parts, -1)
    step = max(1, by_part.shape[1] * _PIECE_SIZE // num_values)
    if isinstance(weight, Matrix) and weight.in_strips:
        step = -(-step // strips.LANES) * strips.LANES
    for first in range(0, by_part.shape[1], step):
        some = by_part[:, first : first + step].ravel()
        piece = _arrays(tensor, weight, [Axis(len(some), some), *inputs])
        is_cut = isinstance(weight, Matrix) and weight.in_strips
        yield Piece(first // strips.LANES if is_cut else first, piece)


def _is_held_as_stored(tensor: Stored, weight: Declared, layouts: list[Axis]) -> bool:
    is_quantized = isinstance(weight, Matrix) and (weight.form.is_quantized or weight.in_strips)
    is_moved = any(layout.sources is not None for layout in layouts)
    return not (is_quantized or is_moved or isinstance(tensor, QuantizedTensor))


def _arrays(tensor: Stored, weight: Declared, layouts: list[Axis]) -> dict[str, np.ndarray]:
    form = weight.form if isinstance(weight, Matrix) else None
    rows, *inputs = layouts
    if isinstance(tensor, QuantizedTensor):
        tensor = tensor.map(lambda array: rows.lay_out(array, 0))
    else:
        tensor = rows.lay_out(tensor, 0)
    if form is not None and form.is_quantized:
        # Rounded in the model's own order, so that no mesh rounds otherwise.
        tensor = rounded(tensor, form)
        assert isinstance(weight, Matrix)
        tensor = _lay_out_inputs(tensor, inputs[0], source_of(weight).pattern_name)
        return _strips(tensor, form) if weight.in_strips else _parts(tensor)
    if isinstance(tensor, QuantizedTensor):
        tensor = tensor.dequantize()
    for dim, layout in enumerate(inputs, start=1):
        tensor = layout.lay_out(tensor, dim)
    if isinstance(weight, Matrix) and weight.in_strips:
        bits = np.ascontiguousarray(tensor.astype(BFLOAT16)).view(np.uint16)
        return {"values": strips.pack_floats(bits)}
    return {"values": tensor}


def pack(values: np.ndarray, group: int) -> np.ndarray:
    """Packs 4-bit values `[out, in]` two in a byte, as `QuantizedMatrix` holds them."""
    halves = values.reshape(values.shape[0], -1, 2, group // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(values.shape[0], -1)


def unpack(packed: np.ndarray, group: int) -> np.ndarray:
    """Undoes `pack`."""
    halves = packed.reshape(packed.shape[0], -1, 1, group // 2)
    return np.concatenate((halves & 15, halves >> 4), axis=2).reshape(packed.shape[0], -1)


def _rows(tensor: Stored, rows: slice) -> Stored:
    if isinstance(tensor, QuantizedTensor):
        return tensor.map(lambda array: array[rows])
    return tensor[rows]


def _lay_out_inputs(tensor: QuantizedTensor, inputs: Axis, name: str) -> QuantizedTensor:
    """Lays out a tensor's inputs without rounding it again: its groups move as they are."""
    if inputs.sources is None:
        return tensor
    groups = _group_layout(inputs, tensor, name)
    return QuantizedTensor(
        inputs.lay_out(tensor.values, 1),
        groups.lay_out(tensor.scales, 1),
        None if tensor.minimums is None else groups.lay_out(tensor.minimums, 1),
    )


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


def _strips(tensor: QuantizedTensor, form: Form) -> dict[str, np.ndarray]:
    num_inputs, dtype = tensor.shape[1], np.float16 if form.has_half_scales else np.float32
    pack_values = strips.pack_bytes if tensor.minimums is None else strips.pack_nibbles
    parts = {"values": pack_values(tensor.values)}
    for name, numbers in (("scales", tensor.scales), ("minimums", tensor.minimums)):
        if numbers is not None:
            parts[name] = strips.pack_scales(numbers.astype(dtype), num_inputs)
    return parts
