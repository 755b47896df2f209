"""Give traced recurrences the names of the states that they compute, and merge those that share a state.

A layer may compute the recurrence of each group of its heads by a call of its own and store the states as
one, such as the heads of Zamba's Mamba. One `LinearAttention` with all of the heads is the same: each group
is a head of queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from llmc.errors import UnsupportedError
from llmc.graph import states
from llmc.graph.domains import TRACE
from llmc.graph.edit import set_value
from llmc.graph.match import dims_of, find_nodes, operand
from llmc.trace.capture import Capture

#: Attributes that are sums over the merged recurrences.
_SUMS = ("heads", "key_heads")


def name_recurrences(graph: ir.Graph, capture: Capture) -> None:
    """Give every traced recurrence the layer of its state and its number there, instead of its own number.

    Raises:
        UnsupportedError: Recurrences of different kinds share a state.
    """
    nodes = {
        n.attributes.pop("number").as_int(): n for n in find_nodes(graph, states.LINEAR_ATTENTION, TRACE)
    }
    merged = False
    for numbers, key in capture.states.items():
        node = nodes[numbers[0]]
        if len(numbers) > 1:
            node = _merge(graph, [nodes[number] for number in numbers], key.layer)
            merged = True
        for name, value in (("layer", key.layer), ("index", key.index)):
            node.attributes[name] = ir.AttrInt64(name, value)
    if merged:
        graph.sort()


def _merge(graph: ir.Graph, parts: Sequence[ir.Node], layer: int) -> ir.Node:
    """Replace `parts` by one recurrence with the heads of all of them, in their order."""
    first = parts[0]
    if len({_kind(part) for part in parts}) > 1:
        raise UnsupportedError(f"layer {layer} joins the states of recurrences of different kinds")
    attributes = {name: first.attributes[name] for name in ("scale", "delta")}
    for name in _SUMS:
        total = sum(part.attributes[name].as_int() for part in parts)
        attributes[name] = ir.AttrInt64(name, total)
    joined = []
    for position in range(len(first.inputs)):
        values = [operand(part, position) for part in parts]
        *lead, width = dims_of(values[0])
        node = ir.Node("", "Concat", values, [ir.AttrInt64("axis", -1)])
        name = f"{first.name}/joined_{position}"
        set_value(node.outputs[0], name, [*lead, int(str(width)) * len(parts)], values[0].dtype)
        graph.append(node)
        joined.append(node.outputs[0])
    whole = ir.Node(TRACE, first.op_type, joined, list(attributes.values()), num_outputs=2, name=first.name)
    output, state = (dims_of(value) for value in first.outputs)
    output[-1], state[1] = (int(str(size)) * len(parts) for size in (output[-1], state[1]))
    for new, old, dims in zip(whole.outputs, first.outputs, (output, state), strict=True):
        set_value(new, f"{old.name}_joined", dims, old.dtype)
    split = ir.Node(
        "",
        "Split",
        [whole.outputs[0]],
        [ir.AttrInt64("axis", -1), ir.AttrInt64("num_outputs", len(parts))],
        num_outputs=len(parts),
    )
    graph.extend([whole, split])
    for part, piece in zip(parts, split.outputs, strict=True):
        set_value(piece, f"{part.outputs[0].name}_part", dims_of(part.outputs[0]), part.outputs[0].dtype)
        ir.convenience.replace_all_uses_with(part.outputs[0], piece)
        graph.remove(part)
    return whole


def _kind(node: ir.Node) -> tuple[object, ...]:
    """Return what merged recurrences have in common: attributes, and the widths of their inputs."""
    numbers = [node.attributes[name].as_int() for name in (*_SUMS, "delta")]
    widths = [str(dims_of(value)[-1]) for value in node.inputs if value is not None]
    return (*numbers, node.attributes["scale"].as_float(), *widths)
