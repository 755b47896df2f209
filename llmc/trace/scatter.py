"""Simplify assignments to parts of a tensor, which torch exports as scatters.

Copies into the parts of a new tensor become one concatenation, a copy into all of a tensor becomes the copied
values, and a number at certain places of an axis becomes a choice by a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.graph.edit import set_value
from llmc.graph.match import (
    constant_of,
    dims_of,
    find_nodes,
    ints_of,
    is_scalar,
    made_by,
    operand,
    permutation_of,
    scalar_of,
)


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


def drop_whole_copies(graph: ir.Graph) -> None:
    """Replace copies into all rows of a tensor, `x[:] = y`, by the copied values."""
    for node in find_nodes(graph, "ScatterND"):
        target, places, values = (operand(node, i) for i in range(3))
        if node.attributes.get_string("reduction", "none") != "none" or dims_of(target) != dims_of(values):
            continue
        if _are_all_rows(places, dims_of(target)[:1]):
            _replace(graph, node, ir.Node("", "Identity", [values]))


def _are_all_rows(places: ir.Value, rows: list[int | str]) -> bool:
    """Return whether `places` (rows, 1) are the numbers of all rows in their order."""
    column = made_by(places, "Unsqueeze")
    counted = made_by(None if column is None else column.inputs[0], "Range")
    if counted is None or not is_scalar(counted.inputs[0], 0) or not is_scalar(counted.inputs[2], 1):
        return False
    size = made_by(counted.inputs[1], "Gather")
    shape = made_by(None if size is None else size.inputs[0], "Shape")
    if size is None or shape is None or not is_scalar(size.inputs[1], 0):
        return False
    return not shape.attributes.get_int("start", 0) and dims_of(shape.inputs[0])[:1] == rows


def mask_places(graph: ir.Graph) -> None:
    """Replace a number at constant places of an axis, `x[..., places] = number`, by a choice by a mask."""
    for node in find_nodes(graph, "Transpose"):
        scatter = made_by(node.inputs[0], "ScatterND")
        target = None if scatter is None else made_by(scatter.inputs[0], "Transpose")
        if scatter is None or target is None or not _undoes(node, target):
            continue
        x, axis = operand(target, 0), (permutation_of(node) or [0]).index(0)
        number, mask = _only_element(scatter.inputs[2]), _mask(scatter, dims_of(x)[axis])
        if number is None or mask is None or x.dtype is None:
            continue
        mask = mask.reshape(-1, *(1,) * (len(dims_of(x)) - 1 - axis))
        constants = []
        for array in (mask, np.array(number, x.dtype.numpy())):
            constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array))])
            dtype = ir.DataType.from_numpy(array.dtype)
            constants.append(
                set_value(constant.outputs[0], f"{node.outputs[0].name}_{dtype.name}", array.shape, dtype)
            )
            graph.insert_before(node, constant)
        _replace(graph, node, ir.Node("", "Where", [*constants, x]))


def _undoes(node: ir.Node, earlier: ir.Node) -> bool:
    """Return whether the Transpose `node` reverses the Transpose `earlier`."""
    order, first = permutation_of(node), permutation_of(earlier)
    return order is not None and first is not None and [first[i] for i in order] == list(range(len(order)))


def _mask(scatter: ir.Node, size: int | str) -> np.ndarray | None:
    """Return whether each of `size` rows is replaced by a ScatterND at constant rows; None for another."""
    places = ints_of(scatter.inputs[1])
    if scatter.attributes.get_string("reduction", "none") != "none" or not isinstance(size, int):
        return None
    if places is None or dims_of(scatter.inputs[1]) != [len(places), 1]:
        return None
    mask = np.zeros(size, np.bool_)
    mask[places] = True
    return mask


def _only_element(value: ir.Value | None) -> float | None:
    """Return the number that every element of `value` is; None if it is not a constant."""
    expanded = made_by(value, "Expand")
    source = value if expanded is None else expanded.inputs[0]
    if (number := scalar_of(source)) is not None:
        return number
    tensor = constant_of(source)
    elements = np.unique(tensor.numpy()) if tensor is not None else np.empty(0)
    return float(elements[0]) if elements.size == 1 else None


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
    _replace(
        graph, node, ir.Node("", "Concat", [p.values for p in parts], [ir.AttrInt64("axis", parts[0].axis)])
    )


def _replace(graph: ir.Graph, node: ir.Node, new: ir.Node) -> None:
    """Insert `new`, whose output takes the place and the name of that of `node`."""
    old = node.outputs[0]
    new.metadata_props.update(node.metadata_props)
    set_value(new.outputs[0], old.name, old.shape, old.dtype)
    graph.insert_before(node, new)
    old.name = f"{old.name}_scattered"
    ir.convenience.replace_all_uses_with(old, new.outputs[0], replace_graph_outputs=True)
