"""Read from a graph what the checks of its engine need."""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from llmc.graph.model import layer_of

#: TensorRT's names of the types that quantized weights are stored in.
_STORED = {
    ir.DataType.INT4: "Int4",
    ir.DataType.INT8: "Int8",
    ir.DataType.FLOAT8E4M3FN: "FP8",
    ir.DataType.FLOAT4E2M1: "FP4E2M1",
}


@dataclass(frozen=True)
class Outline:
    """Nodes of a graph by name.

    Args:
        attention: Names of all `Attention` nodes.
        products: Products with a quantized weight, and TensorRT's names of the types that each is computed
            from: the weight's, and the activation's if it is quantized too, otherwise None.
        middle: Names of the nodes of the middle decoder layer.
    """

    attention: frozenset[str]
    products: dict[str, tuple[str, str | None]]
    middle: frozenset[str]


def read_outline(path: Path) -> Outline:
    """Read the outline of an ONNX file."""
    graph = ir.load(path).graph
    layers = [layer for node in graph if (layer := layer_of(node)) is not None]
    middle = max(layers, default=0) // 2
    products = {}
    for node in graph:
        if node.op_type == "MatMul" and (stored := _stored_type(node.inputs[1])) is not None:
            activation = _stored_type(node.inputs[0])
            products[str(node.name)] = _STORED[stored], None if activation is None else _STORED[activation]
    return Outline(
        attention=frozenset(str(n.name) for n in graph if n.op_type == "Attention"),
        products=products,
        middle=frozenset(str(n.name) for n in graph if layer_of(n) == middle),
    )


def _stored_type(value: ir.Value | None) -> ir.DataType | None:
    """Return the type in which a factor is stored before its dequantization; None for a float factor."""
    while value is not None and (node := value.producer()) is not None:
        value = node.inputs[0]
        if node.op_type == "DequantizeLinear":
            return value.dtype if value is not None and value.dtype in _STORED else None
        if node.op_type != "Transpose":
            return None
    return None
