"""Turn copies into the parts of a new tensor, which torch exports as scatters, into one concatenation."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from llmc.graph.edit import set_value
from llmc.graph.match import dims_of, find_nodes, ints_of, made_by, operand, permutation_of


@dataclass(frozen=True)
class _Part:
    """The positions along an axis that `values` replaces in `target`."""

    axis: int
    start: int
    stop: int
    values: ir.Value
    target: ir.Value


def join_parts(graph: ir.Graph) -> None:
    """Replace copies into parts of a tensor that together cover an axis by a concatenation of the parts.

    `x[..., :a] = y` and `x[..., a:] = z` become Concat(y, z): the tensor x that they overwrite is not read.
    """
    for node in find_nodes(graph, "Transpose"):
        whole = node.outputs[0]
        parts: list[_Part] = []
        part = _replaced_part(whole)
        while part is not None and (not parts or part.axis == parts[0].axis):
            parts.append(part)
            part = _replaced_part(part.target)
        if parts and _covered(whole, parts):
            _concatenate(graph, node, sorted(parts, key=lambda p: p.start))


def _replaced_part(value: ir.Value) -> _Part | None:
    """Return the part of `value` that was replaced last, if its axis was moved to the front for that."""
    node = made_by(value, "Transpose")
    scatter = None if node is None else made_by(node.inputs[0], "ScatterND")
    if node is None or scatter is None or scatter.attributes.get_string("reduction", "none") != "none":
        return None
    order = permutation_of(node)
    target, values = (made_by(scatter.inputs[i], "Transpose") for i in (0, 2))
    positions = ints_of(scatter.inputs[1])
    if order is None or target is None or values is None or not positions:
        return None
    axis = order.index(0)
    swapped = list(range(len(order)))
    swapped[0], swapped[axis] = axis, 0
    if any(permutation_of(n) != swapped for n in (node, target, values)):
        return None
    start, stop = positions[0], positions[0] + len(positions)
    if dims_of(scatter.inputs[1]) != [len(positions), 1] or positions != list(range(start, stop)):
        return None
    return _Part(axis, start, stop, operand(values, 0), operand(target, 0))


def _covered(whole: ir.Value, parts: list[_Part]) -> bool:
    """Return whether the parts cover their axis of `whole`, and none of them overlap."""
    bounds = sorted((p.start, p.stop) for p in parts)
    edges = [0, *(stop for _, stop in bounds)]
    return [start for start, _ in bounds] == edges[:-1] and dims_of(whole)[parts[0].axis] == edges[-1]


def _concatenate(graph: ir.Graph, node: ir.Node, parts: list[_Part]) -> None:
    old = node.outputs[0]
    joined = ir.Node("", "Concat", [p.values for p in parts], [ir.AttrInt64("axis", parts[0].axis)])
    joined.metadata_props.update(node.metadata_props)
    set_value(joined.outputs[0], old.name, old.shape, old.dtype)
    graph.insert_before(node, joined)
    old.name = f"{old.name}_scattered"
    ir.convenience.replace_all_uses_with(old, joined.outputs[0], replace_graph_outputs=True)
