"""Take rotary embeddings that stand by themselves into a region."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from llmc.backends.compiled.operands import space_of, width_of
from llmc.backends.compiled.program import Fields, Operation
from llmc.graph.domains import MICROSOFT
from llmc.graph.match import dims_of, operand

if TYPE_CHECKING:
    from llmc.backends.compiled.region import RegionBuilder

#: The operator, by domain and name.
ROTARY = (MICROSOFT, "RotaryEmbedding")


def check_rotary_embedding(node: ir.Node) -> str | None:
    """Return why kernels cannot compute a RotaryEmbedding; None if they can."""
    source, positions, cos = (operand(node, i) for i in range(3))
    heads = node.attributes.get_int("num_heads", 0)
    if width_of(source) == 0 or len(dims_of(source)) != 3 or heads == 0 or width_of(source) % heads:
        return "its operand is not one row of heads per token"
    if dims_of(positions) != ["batch", "sequence"] or positions.dtype != ir.DataType.INT64:
        return "its positions are not one for each token"
    if len(dims_of(cos)) != 2 or any(not isinstance(d, int) for d in dims_of(cos)):
        return "its tables have no static size"
    if node.attributes.get_float("scale", 1.0) != 1.0:
        return "it has a scale"
    return None


def rotary(builder: RegionBuilder, node: ir.Node) -> None:
    """Add a RotaryEmbedding."""
    source, positions, cos, sin = (operand(node, i) for i in range(4))
    heads, width = node.attributes["num_heads"].as_int(), width_of(source)
    length, half = (int(d) for d in dims_of(cos))
    interleaved = str(bool(node.attributes.get_int("interleaved", 0))).lower()
    fields: Fields = {
        "row": f"rotary_row<{heads}, {width // heads}, {2 * half}, {interleaved}>",
        "check": "check_positions",
        "a": builder.place(source),
        "lengths": builder.input(positions),
        "cos": builder.weight(cos),
        "sin": builder.weight(sin),
        "limit": length,
        "out": builder.make(node.outputs[0], width, space_of(source)),
    }
    builder.program.operations.append(Operation("row", space_of(source), fields))
