"""Read a node's operands: rows of features, vectors, numbers, packed matrices."""

import onnx_ir as ir

from llmc.backends.compiled.pack import PackedLayout
from llmc.backends.compiled.program import Space
from llmc.graph.domains import MICROSOFT
from llmc.graph.match import behind, constant_of, dims_of, input_of, made_by, operand
from llmc.graph.model import PackedZero

#: Bytes of an activation's code by the accuracy level of MatMulNBits: 4 needs int8, 2 at least float16.
PARTS = {4: 1, 2: 2}
#: Norms by domain and name: whether the mean is subtracted, whether a sum is included.
NORMS = {
    ("", "SimplifiedLayerNormalization"): (False, False),
    ("", "LayerNormalization"): (True, False),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): (False, True),
    (MICROSOFT, "SkipLayerNormalization"): (True, True),
}


def width_of(value: ir.Value) -> int:
    """Return the features of one row of an activation; 0 if the value is not an activation."""
    dims = dims_of(value)
    if len(dims) < 3 or dims[0] != "batch" or dims[1] not in ("sequence", 1):
        return 0
    width = 1
    for dim in dims[2:]:
        if not isinstance(dim, int):
            return 0
        width *= dim
    return width


def space_of(value: ir.Value) -> Space:
    return "kLast" if dims_of(value)[1] == 1 else "kTokens"


def slice_bounds(node: ir.Node) -> tuple[int, int] | None:
    """Return (first, one past the last) of a Slice of the features with constant bounds and step 1."""
    source = node.inputs[0]
    constants = [constant_of(v) for v in node.inputs[1:]]
    if source is None or len(constants) < 3 or len(dims_of(source)) != 3 or width_of(source) == 0:
        return None
    numbers = [None if c is None or c.size != 1 else int(c.numpy().reshape(())) for c in constants]
    start, stop, axis, step = (*numbers, 1)[:4]
    if start is None or stop is None or axis not in (2, -1) or step != 1:
        return None
    width = width_of(source)
    low, high = (min(max(x + width if x < 0 else x, 0), width) for x in (start, stop))
    return low, high


def shift_of(node: ir.Node) -> ir.Value | None:
    """Return what is added to the positions of an attention's tokens for its rotary tables, int64 ().

    Returns None if nothing is added, or if its position ids are computed in another way.
    """
    added = made_by(input_of(node, 9), "Add")
    if added is None:
        return None
    source, shift = operand(added, 0), operand(added, 1)
    plain = source.name == "position_ids" and source.is_graph_input()
    return shift if plain and dims_of(shift) == [] and shift.dtype is ir.DataType.INT64 else None


def reads_shared_cache(node: ir.Node) -> bool:
    """Return whether an attention reads the cache that another layer has extended, and has no present."""
    return not any(output.name for output in node.outputs[1:3])


def codes_of(node: ir.Node) -> ir.Value:
    """Return the codes of an embedding, before the reshape that is in between if a product shares them."""
    return behind(operand(node, 0), "Reshape")


def scales_of(node: ir.Node) -> list[ir.Value]:
    """Return the scales and, if there are any, zero points of a product or an embedding, as stored.

    If their type differs from that of the activations, a Cast follows them.
    """
    return [behind(value, "Cast") for value in node.inputs[2:4] if value is not None]


def _zero_of(node: ir.Node) -> PackedZero:
    zeros = input_of(node, 3)
    if zeros is None:
        return PackedZero.MIDDLE
    return PackedZero.CODE if zeros.dtype == ir.DataType.UINT8 else PackedZero.MINIMUM


def layout_of(node: ir.Node) -> PackedLayout:
    n, k, bits, block = (node.attributes[a].as_int() for a in ("N", "K", "bits", "block_size"))
    return PackedLayout(n, k, bits, block, _zero_of(node))


def embedding_layout(node: ir.Node) -> PackedLayout:
    bits, block = (node.attributes[a].as_int() for a in ("bits", "block_size"))
    features = _features_of(node.outputs[0], block)
    return PackedLayout(int(dims_of(operand(node, 2))[0]), features, bits, block, _zero_of(node))


def _features_of(rows: ir.Value, block: int) -> int:
    """Return the features of an embedding's rows, without padding of the last block that a Slice cuts off."""
    width, users = width_of(rows), [user for user, _ in rows.uses()]
    if len(users) != 1 or users[0].op_type != "Slice" or rows.is_graph_output():
        return width
    start, stop = slice_bounds(users[0]) or (0, width)
    return stop if start == 0 and width - block < stop else width
