"""What a node's operands are: rows of features, vectors, numbers, packed matrices."""

import onnx_ir as ir

from llmc.backends.compiled.pack import PackedLayout
from llmc.backends.compiled.program import Space
from llmc.graph.model import constant_of
from llmc.graph.weights import LazyWeight

MICROSOFT = "com.microsoft"
#: Norms by domain and name: whether the mean is taken off, whether a sum is part of it.
NORMS = {
    ("", "SimplifiedLayerNormalization"): (False, False),
    ("", "LayerNormalization"): (True, False),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): (False, True),
    (MICROSOFT, "SkipLayerNormalization"): (True, True),
}


def dims_of(value: ir.Value) -> list[int | str]:
    return [d if isinstance(d, int) else str(d.value) for d in value.shape or ()]


def width_of(value: ir.Value) -> int:
    """Features of one row of an activation; 0 if it is no activation."""
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


def scalar_of(value: ir.Value) -> float | None:
    tensor = constant_of(value)
    return float(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def given(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise ValueError("an operand that was checked is missing")
    return value


def lazy_of(value: ir.Value) -> LazyWeight:
    tensor = value.const_value
    if not isinstance(tensor, LazyWeight):
        raise ValueError(f"{value.name} was checked to be a weight")
    return tensor


def codes_of(node: ir.Node) -> ir.Value:
    """The codes of an embedding, before the reshape that stands in between where a product shares them."""
    value = given(node.inputs[0])
    producer = value.producer()
    return given(producer.inputs[0]) if producer is not None and producer.op_type == "Reshape" else value


def layout_of(node: ir.Node) -> PackedLayout:
    n, k, bits, block = (node.attributes[a].as_int() for a in ("N", "K", "bits", "block_size"))
    return PackedLayout(n, k, bits, block, len(node.inputs) > 3 and node.inputs[3] is not None)


def embedding_layout(node: ir.Node) -> PackedLayout:
    bits, block = (node.attributes[a].as_int() for a in ("bits", "block_size"))
    zeros = len(node.inputs) > 3 and node.inputs[3] is not None
    return PackedLayout(int(dims_of(given(node.inputs[2]))[0]), width_of(node.outputs[0]), bits, block, zeros)
