"""Split float zero points so that ONNX Runtime computes them fast: a product of codes and one of minimums.

A weight (code - zero point) * scale with any zero point is code * scale + minimum. With a middle code c,

    x w = sum over blocks of  (sum of x (code - c)) scale  +  (sum of x) (minimum + c scale)

the first term is MatMulNBits with integer zero points, the second a small product of the sums over the blocks
of x. ONNX Runtime's own MatMulNBits with float zero points converts the whole matrix to floats at every call,
and does not support them with 8 bits (1.31.1, CPU). Codes, scales and minimums are stored; the rest is folded
when a session starts. A lookup adds the minimums of its entries in the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.errors import GraphError
from llmc.graph.domains import STANDARD
from llmc.graph.edit import Site, add_initializer, name_constant, take_over
from llmc.graph.match import behind, operand
from llmc.graph.model import CODE_BITS, Graph
from llmc.graph.weights import LazyWeight, WeightGroup

Dim = int | ir.SymbolicDim
#: Indices of zero points and of scales among the inputs of both operators.
_ZEROS_AT, _SCALES_AT = 3, 2


def split_minimums(graph: Graph) -> int:
    """Rewrite every MatMulNBits and GatherBlockQuantized of `graph` with float zero points; return how many.

    Raises:
        GraphError: Zero points are not stored with their scales.
    """
    rewritten = [node for node in graph.graph if has_float_zeros(node)]
    stored: dict[ir.Value, _Stored] = {}
    sums: dict[tuple[ir.Value, int], ir.Value] = {}
    dropped = set()
    for node in rewritten:
        zeros = operand(node, _ZEROS_AT)
        dropped.add(zeros)
        if zeros not in stored:
            stored[zeros] = _store(graph.graph, node, zeros)
        split = _split_product if node.op_type == "MatMulNBits" else _split_lookup
        split(_Nodes(graph.graph, node), stored[zeros], sums)
    for zeros in dropped:
        del graph.graph.initializers[str(zeros.name)]
    return len(rewritten)


def has_float_zeros(node: ir.Node) -> bool:
    """Return whether `node` reads codes whose zero points are floats."""
    if node.op_type not in ("MatMulNBits", "GatherBlockQuantized") or len(node.inputs) <= _ZEROS_AT:
        return False
    zeros = node.inputs[_ZEROS_AT]
    return zeros is not None and zeros.dtype is not ir.DataType.UINT8


@dataclass(frozen=True)
class _WithMinimums:
    """The computation of codes, scales and minimums, the latter in the type of the stored scales."""

    source: WeightGroup

    def __call__(self) -> Mapping[str, Array]:
        members = self.source.compute()
        scales = members["scales"]
        minimums = -members["zero_points"] * scales.astype(np.float32)
        return {"codes": members["codes"], "scales": scales, "minimums": minimums.astype(scales.dtype)}


@dataclass
class _Stored:
    """The initializers of one matrix, each (outputs, blocks), and values computed from them.

    Args:
        stem: Name of the matrix.
        middle: The code that is the integer zero point.
        offsets: minimum + middle * scale, (blocks, outputs).
        points: Integer zero points; None if `middle` is the operators' default.
    """

    stem: str
    middle: int
    outputs: int
    blocks: int
    scales: ir.Value
    minimums: ir.Value
    offsets: ir.Value | None = None
    points: ir.Value | None = None


@dataclass(frozen=True)
class _Nodes:
    """An emitter of nodes before `anchor`, with its metadata except the width of its codes."""

    graph: ir.Graph
    anchor: ir.Node

    def emit(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        shape: Sequence[Dim],
        dtype: ir.DataType,
        *,
        like: ir.Node | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        """Emit a node, with domain and attributes of `like` if it is given, and return its output."""
        metadata = {key: text for key, text in self.anchor.metadata_props.items() if key != CODE_BITS}
        emitted = Site(self.graph, self.anchor, metadata).emit(
            op,
            inputs,
            name,
            domain=STANDARD if like is None else like.domain,
            attributes=attributes if like is None else like.attributes,
            shape=shape,
            dtype=dtype,
        )
        return emitted.outputs[0]

    def cast(self, value: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
        """Cast `value` to type `dtype`."""
        if value.dtype is dtype:
            return value
        return self.emit("Cast", [value], name, tuple(value.shape or ()), dtype, to=int(dtype))

    def constant(self, name: str, array: Array) -> ir.Value:
        """Return a small initializer, created once per name."""
        return name_constant(self.graph, name, array)


def _store(graph: ir.Graph, node: ir.Node, zeros: ir.Value) -> _Stored:
    """Store minimums beside codes and scales, in one group."""
    tensor = zeros.const_value
    scales = behind(operand(node, _SCALES_AT), "Cast")
    if not isinstance(tensor, LazyWeight) or not isinstance(scales.const_value, LazyWeight):
        raise GraphError(f"the zero points {zeros.name} are not stored with their scales")
    group = WeightGroup(tensor.sources, _WithMinimums(tensor.group))
    for value in list(graph.initializers.values()):
        member = value.const_value
        if isinstance(member, LazyWeight) and member.group is tensor.group and value is not zeros:
            value.const_value = _member(member, str(value.name), member.dtype, group, member.key)
    stem = str(zeros.name).removesuffix(".zero_points")
    lazy = _member(tensor, f"{stem}.minimums", scales.const_value.dtype, group, "minimums")
    minimums = add_initializer(graph, lazy)
    bits = int(node.metadata_props.get(CODE_BITS, node.attributes["bits"].as_int()))
    outputs, blocks = (int(size) for size in tensor.shape.numpy())
    return _Stored(stem, 1 << (bits - 1), outputs, blocks, scales, minimums)


def _member(like: LazyWeight, name: str, dtype: ir.DataType, group: WeightGroup, key: str) -> LazyWeight:
    return LazyWeight(name=name, dtype=dtype, shape=like.shape.numpy(), group=group, key=key)


def _split_product(site: _Nodes, stored: _Stored, sums: dict[tuple[ir.Value, int], ir.Value]) -> None:
    node = site.anchor
    activation, product = operand(node, 0), node.outputs[0]
    key = (activation, node.attributes["block_size"].as_int())
    if key not in sums:
        sums[key] = _sum_blocks(site, *key)
    dtype, shape, name = product.dtype or ir.DataType.FLOAT, tuple(product.shape or ()), str(product.name)
    inputs = [*node.inputs[:_ZEROS_AT], _points(site, stored)]
    high = site.emit("MatMulNBits", inputs, f"{name}.codes", shape, dtype, like=node)
    low = site.emit("MatMul", [sums[key], _offsets(site, stored, dtype)], f"{name}.minimums", shape, dtype)
    _replace(site, site.emit("Add", [high, low], f"{name}.whole", shape, dtype))


def _split_lookup(site: _Nodes, stored: _Stored, _: dict[tuple[ir.Value, int], ir.Value]) -> None:
    node, ids = site.anchor, operand(site.anchor, 1)
    looked_up, stem, blocks = node.outputs[0], stored.stem, stored.blocks
    dtype, name = looked_up.dtype or ir.DataType.FLOAT, str(looked_up.name)
    block, middle = node.attributes["block_size"].as_int(), 1 << (node.attributes["bits"].as_int() - 1)
    lead, row = tuple(ids.shape or ()), tuple(looked_up.shape or ())
    by_block = (*lead, blocks)

    def entries(of: ir.Value, part: str) -> ir.Value:
        rows = site.emit("Gather", [of, ids], f"{name}.{part}", by_block, of.dtype or dtype, axis=0)
        return site.cast(rows, f"{name}.wide_{part}", dtype)

    scales, minimums = entries(stored.scales, "scales"), entries(stored.minimums, "minimums")
    number = site.constant(f"{stem}.lookup_middle", np.array(middle, dtype.numpy()))
    raised = site.emit("Mul", [scales, number], f"{name}.raised", by_block, dtype)
    low = site.emit("Add", [minimums, raised], f"{name}.low", by_block, dtype)
    last = site.constant(f"{stem}.last_axis", np.array([-1], np.int64))
    low = site.emit("Unsqueeze", [low, last], f"{name}.low_by_block", (*by_block, 1), dtype)
    inputs = node.inputs[:_ZEROS_AT]
    high = site.emit("GatherBlockQuantized", inputs, f"{name}.codes", row, dtype, like=node)
    cut = site.constant(f"{stem}.block_shape", _shape(len(lead), blocks, block))
    split = site.emit("Reshape", [high, cut], f"{name}.by_block", (*by_block, block), dtype)
    whole = site.emit("Add", [split, low], f"{name}.sum", (*by_block, block), dtype)
    joined = site.constant(f"{stem}.row_shape", _shape(len(lead), blocks * block))
    _replace(site, site.emit("Reshape", [whole, joined], f"{name}.whole", row, dtype))


def _sum_blocks(site: _Nodes, activation: ir.Value, block: int) -> ir.Value:
    """Emit sums over the blocks of an activation's features, (…, blocks)."""
    *lead, features = tuple(activation.shape or ())
    if not isinstance(features, int) or features % block:
        raise GraphError(f"{activation.name} has {features} features, not a multiple of blocks of {block}")
    dtype = activation.dtype or ir.DataType.FLOAT
    shape = (*lead, features // block, block)
    name = f"{activation.name}.sums_{block}"
    cut = site.constant(f"{name}.shape", _shape(len(lead), features // block, block))
    split = site.emit("Reshape", [activation, cut], f"{name}.blocks", shape, dtype)
    last = site.constant(f"{name}.axis", np.array([-1], np.int64))
    return site.emit("ReduceSum", [split, last], name, shape[:-1], dtype, keepdims=0)


def _offsets(site: _Nodes, stored: _Stored, dtype: ir.DataType) -> ir.Value:
    """Emit minimum + middle * scale, (blocks, outputs) of type `dtype`, computed in float32."""
    if stored.offsets is None:
        stem, shape, wide = stored.stem, (stored.outputs, stored.blocks), ir.DataType.FLOAT
        middle = site.constant(f"{stem}.middle", np.array(stored.middle, np.float32))
        scales = site.cast(stored.scales, f"{stem}.offset_scales", wide)
        minimums = site.cast(stored.minimums, f"{stem}.offset_minimums", wide)
        raised = site.emit("Mul", [scales, middle], f"{stem}.raised", shape, wide)
        exact = site.emit("Add", [minimums, raised], f"{stem}.exact_offsets", shape, wide)
        narrow = site.cast(exact, f"{stem}.narrow_offsets", dtype)
        stored.offsets = site.emit("Transpose", [narrow], f"{stem}.offsets", shape[::-1], dtype, perm=[1, 0])
    return stored.offsets


def _points(site: _Nodes, stored: _Stored) -> ir.Value | None:
    """Emit zero points that are all `middle`; None if that is the operator's default."""
    bits = site.anchor.attributes["bits"].as_int()
    if stored.points is None and stored.middle != 1 << (bits - 1):
        shape = (stored.outputs, -(-stored.blocks * bits // 8))
        each = stored.middle if bits == 8 else stored.middle * 17  # two in a byte
        point = site.constant(f"{stored.stem}.point", np.array([[each]], np.uint8))
        size = site.constant(f"{stored.stem}.points_shape", np.array(shape, np.int64))
        stored.points = site.emit("Expand", [point, size], f"{stored.stem}.points", shape, ir.DataType.UINT8)
    return stored.points


def _replace(site: _Nodes, replacement: ir.Value) -> None:
    """Replace the output of the site's node by `replacement`, and remove the node."""
    take_over(site.anchor.outputs[0], replacement)
    site.graph.remove(site.anchor, safe=True)


def _shape(lead: int, *last: int) -> Array:
    return np.array([*(0 for _ in range(lead)), *last], np.int64)
