"""Take operators with a state of fixed size into a region: causal convolution and linear attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from llmc.backends.compiled.operands import is_static, is_turned, width_of
from llmc.backends.compiled.program import Caches, Fields, Operation
from llmc.graph.domains import DIALECT
from llmc.graph.match import dims_of, input_of, operand
from llmc.graph.states import CAUSAL_CONV, LINEAR_ATTENTION

if TYPE_CHECKING:
    from llmc.backends.compiled.region import RegionBuilder

#: The operators, by domain and name.
CONVOLUTION, ATTENTION = (DIALECT, CAUSAL_CONV), (DIALECT, LINEAR_ATTENTION)


def check_convolution(node: ir.Node) -> str | None:
    """Return why kernels cannot compute a `CausalConv`; None if they can."""
    weight, bias = operand(node, 1), input_of(node, 2)
    dims = dims_of(weight)
    vectors = [weight] if bias is None else [weight, bias]
    if any(not is_static(v) for v in vectors) or len(dims) != 3:
        return "its weight or bias is not a float32 tensor of the model"
    if not is_turned(operand(node, 0)) or dims[:2] != [width_of(operand(node, 0)), 1]:
        return "its operand is not one row of channels per token"
    return _check_state(node, 3, 4)


def check_attention(node: ir.Node) -> str | None:
    """Return why kernels cannot compute a `LinearAttention`; None if they can."""
    numbers = (operand(node, i) for i in (0, 1, 2, 4))
    if any(width_of(v) == 0 or is_turned(v) for v in numbers):
        return "its query, key, value or decay is not one row of features per token"
    if node.attributes["delta"].as_int() and not width_of(operand(node, 5)):
        return "its beta is not one row of features per token"
    return _check_state(node, 3, 6)


def _check_state(node: ir.Node, past: int, mask: int) -> str | None:
    state, real = operand(node, past), operand(node, mask)
    if not state.is_graph_input() or any(not isinstance(d, int) for d in dims_of(state)[1:]):
        return "its state is not an input of the graph"
    if state.dtype != ir.DataType.FLOAT:
        return "its state is not float32"
    if not node.outputs[1].is_graph_output():
        return "its state is not an output of the graph"
    if real.dtype != ir.DataType.INT64 or dims_of(real) != ["batch", "total"]:
        return "its mask is not that of all tokens"
    return None


def convolution(builder: RegionBuilder, node: ir.Node) -> None:
    """Add a `CausalConv`."""
    weight, bias = operand(node, 1), input_of(node, 2)
    channels, _, taps = dims_of(weight)
    silu = str(bool(node.attributes["silu"].as_int())).lower()
    kind = f"Convolution<{channels}, {taps}, {silu}>"
    functions: Fields = {f: f"{kind}::{f}" for f in ("check", "chunks", "chunk")}
    fields: Fields = {
        **functions,
        "a": builder.place(operand(node, 0)),
        "out": builder.make(node.outputs[0], int(channels), "kTokens"),
        "weight": builder.weight(weight),
        "cache": _state(builder, node),
        "lengths": builder.input(operand(node, 4)),
    }
    if bias is not None:
        fields["bias"] = builder.weight(bias)
    builder.program.operations.append(Operation("chunk", "kTokens", fields, f"{kind}::scratch"))


def attention(builder: RegionBuilder, node: ir.Node) -> None:
    """Add a `LinearAttention`."""
    _, heads, keys, values = dims_of(operand(node, 3))
    delta = bool(node.attributes["delta"].as_int())
    decay = operand(node, 4)
    by_channel = width_of(decay) != heads
    flags = ", ".join(str(x).lower() for x in (delta, by_channel))
    geometry = f"{heads}, {node.attributes['key_heads'].as_int()}, {keys}"
    narrow = values == 1
    values_of_kind = "" if narrow else f", {values}"
    kind = f"{'Narrow' if narrow else 'Linear'}Attention<{geometry}{values_of_kind}, {flags}>"
    names = ("check", "chunks", "chunk") if narrow else ("check", "chunks", "chunk", "ahead")
    functions: Fields = {f: f"{kind}::{f}" for f in names}
    fields: Fields = {
        **functions,
        **{name: builder.place(operand(node, i)) for name, i in (("a", 0), ("b", 1), ("c", 2), ("d", 4))},
        "cache": _state(builder, node),
        "lengths": builder.input(operand(node, 6)),
        "x": node.attributes["scale"].as_float(),
    }
    if delta:
        fields["e"] = builder.place(operand(node, 5))
    fields["out"] = builder.make(node.outputs[0], int(heads) * int(values), "kTokens")
    builder.program.operations.append(Operation("chunk", "kTokens", fields, f"{kind}::scratch"))


def _state(builder: RegionBuilder, node: ir.Node) -> Caches:
    return builder.state(operand(node, 3), node.outputs[1])
