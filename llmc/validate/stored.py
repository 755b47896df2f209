"""Read tensors as an artifact stores them back as float32.

Quantized matrices are read by the operator schemas of com.microsoft MatMulNBits and GatherBlockQuantized,
(code - zero point) * scale, or code * scale + minimum where minimums are stored beside them, by the schema of
ONNX DequantizeLinear, and by the layout of compiled kernels. The code that wrote them is not used.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.artifact.manifest import MODEL
from llmc.errors import ParityError
from llmc.graph.mapped import MappedPages
from llmc.graph.match import array_of
from llmc.graph.weights import Rows
from llmc.runtime.stacks import PARTS, read_experts, unpack_codes
from llmc.validate.packed import open_packed

#: Number of neighbours along the last axis whose error is measured together if there are no blocks.
BLOCK = 32
#: Bytes in float32 that are read at a time.
_PART_BYTES = 16 << 20
#: Types whose values are evenly spaced.
_EVEN = (ir.DataType.INT4, ir.DataType.INT8)
#: Indices of the inputs that are codes.
_CODES_AT = {"MatMulNBits": (1,), "GatherBlockQuantized": (0,), "QMoE": (2, 5), "DequantizeLinear": (0,)}


@dataclass(frozen=True)
class Stored:
    """The shape and the values of one tensor as the artifact stores it.

    Args:
        shape: (output features, input features), or the shape of a tensor in float.
        read: Returns rows start:stop, float32; a tensor without axes has one row.
        block: Number of neighbours along the last axis that share a scale.
        steps: Distance of neighbouring codes in rows start:stop, to be broadcast over them; None if codes are
            not evenly spaced, or there are none.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int], Array]
    block: int = BLOCK
    steps: Callable[[int, int], Array] | None = None

    def whole(self) -> Array:
        """Read the whole tensor in parts, so that reading needs little memory besides the result."""
        rows, *others = self.shape or (1,)
        values = np.empty((rows, *others), np.float32)
        step = max(1, _PART_BYTES // max(1, 4 * math.prod(others)))
        for start in range(0, rows, step):
            values[start : start + step] = self.read(start, min(start + step, rows))
        return values.reshape(self.shape)


def read_stored(folder: Path, expected: Mapping[str, Rows]) -> dict[str, Stored]:
    """Read every tensor of `expected` from the artifact's model.onnx, except those of an unknown form.

    Raises:
        ParityError: One is missing, has another shape, or lies beyond the end of its file.
    """
    try:
        graph = ir.load(folder / MODEL).graph
    except Exception as error:  # protobuf and onnx_ir raise many kinds of errors on a damaged file
        raise ParityError(f"{folder / MODEL} is not an ONNX model: {error}") from error
    _require_data(graph)
    tensors, pages, turner = {}, MappedPages(graph), _Turner()
    for name, rows in expected.items():
        tensor = _find(graph, name, turner)
        if tensor is None and any(other.startswith(f"{name}.") for other in graph.initializers):
            continue
        if tensor is None:
            raise ParityError(f"the artifact has no weight {name}")
        if tensor.shape not in (rows.shape, rows.shape[::-1]):
            raise ParityError(f"weight {name} has shape {tensor.shape}, the original's {rows.shape}")
        counted = _counted(tensor, pages)
        tensors[name] = counted if counted.shape == rows.shape else turner.turn(counted)
    return tensors


def _counted(tensor: Stored, pages: MappedPages) -> Stored:
    """Return the same tensor; its pages do not stay in memory."""

    def read(start: int, stop: int) -> Array:
        values = tensor.read(start, stop)
        pages.count(values.nbytes)
        return values

    return replace(tensor, read=read)


def _require_data(graph: ir.Graph) -> None:
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = Path(tensor.path)
        size = file.stat().st_size if file.is_file() else 0
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if end > size:
            raise ParityError(f"{file} has {size:,} bytes, and weight {name} ends at byte {end:,}")


def _find(graph: ir.Graph, name: str, turner: "_Turner") -> Stored | None:
    if name in graph.initializers:
        return _plain(graph.initializers[name])
    if (stored := _find_quantized(graph, name)) is not None:
        return stored
    turned = _find_quantized(graph, f"{name}.T")  # quantized from a matrix of (inputs, outputs)
    return None if turned is None else turner.turn(turned)


def _find_quantized(graph: ir.Graph, stem: str) -> Stored | None:
    codes, packed = (graph.initializers.get(f"{stem}.{part}") for part in ("codes", "packed"))
    if codes is not None:
        return _quantized(graph, codes, stem)
    if packed is not None:
        matrix = open_packed(packed)
        return Stored((matrix.outputs, matrix.inputs), matrix.rows, matrix.block)
    return None


def _plain(value: ir.Value) -> Stored | None:
    tensor = value.const_value
    if tensor is None:
        return None
    array = tensor.numpy()
    return Stored(array.shape, lambda start, stop: np.atleast_1d(array)[start:stop].astype(np.float32))


class _Turner:
    """Transpose matrices; reading a part of a matrix reads all of it, and the last matrix is cached."""

    def __init__(self) -> None:
        self._values: tuple[Stored, Array] | None = None
        self._steps: tuple[Stored, Array] | None = None

    def turn(self, tensor: Stored) -> Stored:
        count, shape = tensor.shape[0], tensor.shape
        original_steps = tensor.steps

        def read(start: int, stop: int) -> Array:
            if self._values is None or self._values[0] is not tensor:
                self._values = tensor, tensor.read(0, count).T
            return self._values[1][start:stop]

        def steps(start: int, stop: int) -> Array:
            assert original_steps is not None
            if self._steps is None or self._steps[0] is not tensor:
                self._steps = tensor, np.broadcast_to(original_steps(0, count), shape).T
            return self._steps[1][start:stop]

        return Stored(shape[::-1], read, steps=None if original_steps is None else steps)


def _quantized(graph: ir.Graph, codes: ir.Value, stem: str) -> Stored | None:
    uses = list(codes.uses())
    while uses and uses[0].node.op_type == "Reshape":
        uses = [use for output in uses[0].node.outputs for use in output.uses()] + uses[1:]
    node = next((u.node for u in uses if u.idx in _CODES_AT.get(u.node.op_type, ())), None)
    scales, zeros, minimums = (
        graph.initializers.get(f"{stem}.{part}") for part in ("scales", "zero_points", "minimums")
    )
    if node is not None and node.op_type == "DequantizeLinear":
        return _dequantized(node, codes)
    if node is None or codes.const_value is None or scales is None or scales.const_value is None:
        return None
    if node.op_type == "QMoE":
        parts = next(parts for parts in PARTS if node.inputs[parts[0]] is codes)
        experts, outputs, inputs = (*codes.const_value.shape.numpy()[:2], scales.const_value.shape.numpy()[2])
        features = int(inputs) * node.attributes["block_size"].as_int()
        return Stored(
            (int(experts), int(outputs), features),
            lambda start, stop: read_experts(node, parts, start, stop),
        )
    bits, block = (node.attributes[key].as_int() for key in ("bits", "block_size"))
    packed = codes.const_value.numpy()
    packed = packed.reshape(len(packed), -1)
    scale = scales.const_value.numpy()
    zero, low = array_of(zeros), array_of(minimums)
    features = _width(graph, node, stem) or packed.shape[1] * 8 // bits

    def read(start: int, stop: int) -> Array:
        levels = unpack_codes(packed[start:stop], bits).astype(np.float32)
        blocks = levels.reshape(len(levels), -1, block)
        if low is not None:
            wide = scale[start:stop, :, None].astype(np.float32)
            values = blocks * wide + low[start:stop, :, None].astype(np.float32)
            return values.reshape(len(levels), -1)[:, :features]
        middle: Array | float = 1 << (bits - 1)
        if zero is not None:
            middle = unpack_codes(zero[start:stop], bits)[:, : blocks.shape[1], None].astype(np.float32)
        values = (blocks - middle) * scale[start:stop, :, None].astype(np.float32)
        return values.reshape(len(levels), -1)[:, :features]

    def steps(start: int, stop: int) -> Array:
        return np.repeat(scale[start:stop].astype(np.float32), block, axis=1)[:, :features]

    return Stored((len(packed), features), read, block, steps)


def _width(graph: ir.Graph, node: ir.Node, stem: str) -> int | None:
    """Return the input features without the padding of the last block, if the graph states them."""
    if "K" in node.attributes:
        return node.attributes["K"].as_int()
    width = graph.initializers.get(f"{stem}.width")  # the width that a lookup is cut to
    return None if width is None or width.const_value is None else int(width.const_value.numpy()[0])


def _dequantized(node: ir.Node, codes: ir.Value) -> Stored | None:
    """Read codes of a DequantizeLinear without zero points, whose scales may come from another one."""
    scale = _scales(node)
    if codes.const_value is None or scale is None:
        return None
    array = codes.const_value.numpy()
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    axis += array.ndim if axis < 0 else 0

    def steps(start: int, stop: int) -> Array:
        part = scale
        if block:
            part = np.repeat(scale, block, axis=axis)[start:stop] if axis == 0 else scale[start:stop]
            part = part if axis == 0 else np.repeat(part, block, axis=axis)
        elif axis == 0:
            part = scale[start:stop, None]
        return part

    def read(start: int, stop: int) -> Array:
        values: Array = array[start:stop].astype(np.float32) * steps(start, stop)
        return values

    even = codes.const_value.dtype in _EVEN
    return Stored(
        array.shape,
        read,
        block if block and axis == array.ndim - 1 else BLOCK,
        steps if even else None,
    )


def _scales(node: ir.Node) -> Array | None:
    """Return the scales of a DequantizeLinear, float32."""
    value = node.inputs[1]
    if value is None:
        return None
    if value.const_value is not None:
        scales: Array = value.const_value.numpy().astype(np.float32)
        return scales
    maker = value.producer()
    if maker is None or maker.op_type != "DequantizeLinear" or maker.inputs[0] is None:
        return None
    codes, whole = maker.inputs[0].const_value, _scales(maker)
    return None if codes is None or whole is None else codes.numpy().astype(np.float32) * whole
