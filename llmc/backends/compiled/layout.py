"""Take operators into a region that only move or regroup features: parts, joins, reshapes, transpositions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir as ir

from llmc.backends.compiled.operands import features_of, is_turned, space_of, spread_of, width_of
from llmc.backends.compiled.program import Fields, Operation, RowPlace
from llmc.graph.match import (
    dims_of,
    input_of,
    ints_of,
    operand,
    permutation_of,
    rank_of,
    slice_of,
)

if TYPE_CHECKING:
    from llmc.backends.compiled.region import RegionBuilder

#: Standard operators that leave the rows as they are, and those that reduce the last dimension.
REGROUPING, REDUCING = ("Reshape", "Squeeze", "Unsqueeze", "Identity"), ("ReduceSum", "ReduceMean")


def check_split(node: ir.Node) -> str | None:
    """Return why kernels cannot take a Split; None if they can."""
    if any(width_of(output) == 0 for output in node.outputs):
        return "its parts have no static width"
    axis = node.attributes.get_int("axis", 0)
    return None if _feature_axis(operand(node, 0), axis) is not None else "it is not along the features"


def check_slice(node: ir.Node) -> str | None:
    """Return why kernels cannot take a Slice; None if they can."""
    if _is_whole(node):
        return None
    bounds = slice_of(node.outputs[0])
    if bounds is None or bounds[4] != 1 or _feature_axis(bounds[0], bounds[1]) is None:
        return "it does not cut features at constant places"
    return None if bounds[2] < bounds[3] else "it has no features"


def check_gather(node: ir.Node) -> str | None:
    """Return why kernels cannot take a Gather; None if they can."""
    if width_of(node.outputs[0]) == 0:
        return "it does not choose among features"
    return None if _gathered(node) is not None else "it does not choose neighbouring features"


def check_concat(node: ir.Node) -> str | None:
    """Return why kernels cannot take a Concat; None if they can."""
    axis = node.attributes["axis"].as_int()
    places = {_feature_axis(v, axis) for v in (*node.inputs, node.outputs[0]) if v is not None}
    return "it does not join features" if None in places or len(places) > 1 else None


def check_regroup(node: ir.Node) -> str | None:
    """Return why kernels cannot take a Reshape, Squeeze or Unsqueeze; None if they can."""
    before, after = operand(node, 0), node.outputs[0]
    if dims_of(before) == dims_of(after) and width_of(before):
        return None
    same = width_of(before) and width_of(before) == width_of(after) and space_of(before) == space_of(after)
    if not same or is_turned(before) or is_turned(after):
        return "it changes more than how features are grouped"
    return None


def check_transpose(node: ir.Node) -> str | None:
    """Return why kernels cannot take a Transpose; None if they can."""
    before, after = operand(node, 0), node.outputs[0]
    if permutation_of(node) != [0, 2, 1] or is_turned(before) == is_turned(after):
        return "it does not exchange tokens and features"
    return None if width_of(before) and width_of(before) == width_of(after) else "it has no static width"


def check_expand(node: ir.Node) -> str | None:
    """Return why kernels cannot take an Expand; None if they can."""
    source, output = operand(node, 0), node.outputs[0]
    if width_of(source) == 0 or spread_of(source, output) is None:
        return "it does not repeat features"
    return None


def check_reduce(node: ir.Node) -> str | None:
    """Return why kernels cannot take a ReduceSum or ReduceMean; None if they can."""
    source, axes = operand(node, 0), ints_of(input_of(node, 1))
    if len(features_of(source)) < (1 if node.attributes.get_int("keepdims", 1) else 2) or is_turned(source):
        return "it does not reduce the last dimension of features"
    last = axes is not None and len(axes) == 1 and axes[0] in (-1, rank_of(source) - 1)
    return None if last else "it does not reduce the last dimension of features"


def split(builder: RegionBuilder, node: ir.Node) -> None:
    """Add a Split."""
    axis = _feature_axis(operand(node, 0), node.attributes.get_int("axis", 0)) or 0
    start = 0
    for output in node.outputs:
        size = features_of(output)[axis]
        _cut(builder, operand(node, 0), output, axis, start)
        start += size


def slice_features(builder: RegionBuilder, node: ir.Node) -> None:
    """Add a Slice."""
    source, output = operand(node, 0), node.outputs[0]
    bounds = slice_of(output)
    if _is_whole(node) or bounds is None:
        builder.alias(output, builder.place(source))
    else:
        _cut(builder, source, output, _feature_axis(source, bounds[1]) or 0, bounds[2])


def gather(builder: RegionBuilder, node: ir.Node) -> None:
    """Add a Gather."""
    axis, start = _gathered(node) or (0, 0)
    _cut(builder, operand(node, 0), node.outputs[0], axis, start)


def concat(builder: RegionBuilder, node: ir.Node) -> None:
    """Add a Concat."""
    output = node.outputs[0]
    axis = _feature_axis(output, node.attributes["axis"].as_int()) or 0
    whole, start = builder.make(output, width_of(output), space_of(output)), 0
    outer, step = _around(output, axis)
    for source in node.inputs:
        if source is not None:
            width = width_of(source) // outer
            _copy_parts(builder, builder.place(source), whole.part(start, width), (outer, width, width, step))
            start += width


def regroup(builder: RegionBuilder, node: ir.Node) -> None:
    """Add an operator that leaves the rows as they are."""
    builder.alias(node.outputs[0], builder.place(operand(node, 0)))


def expand(builder: RegionBuilder, node: ir.Node) -> None:
    """Add an Expand."""
    source, output = operand(node, 0), node.outputs[0]
    spread = spread_of(source, output)
    place = builder.place(source)
    builder.alias(output, place if spread is None or spread.copies == 1 else builder.spread(place, spread))


def reduce(builder: RegionBuilder, node: ir.Node) -> None:
    """Add a ReduceSum or ReduceMean."""
    source, output = operand(node, 0), node.outputs[0]
    *groups, width = features_of(source)
    mean = str(node.op_type == "ReduceMean").lower()
    fields: Fields = {
        "row": f"reduce_row<{math.prod(groups)}, {width}, {mean}>",
        "a": builder.place(source),
        "out": builder.make(output, math.prod(groups), space_of(output)),
    }
    builder.program.operations.append(Operation("row", space_of(source), fields))


def choose_tokens(builder: RegionBuilder, node: ir.Node) -> None:
    """Add a GatherND that chooses tokens."""
    a = builder.place(operand(node, 0))
    builder.choice = operand(node, 1)
    fields: Fields = {
        "row": f"chosen_row<{a.width}>",
        "check": "check_choice",
        "a": a,
        "lengths": builder.input(builder.choice),
        "out": builder.make(node.outputs[0], a.width, "kLast"),
    }
    builder.program.operations.append(Operation("row", "kLast", fields))


def _is_whole(node: ir.Node) -> bool:
    """Tell whether a Slice leaves its operand as it is: it drops nothing, and does not reverse."""
    source, steps = operand(node, 0), input_of(node, 4)
    forward = steps is None or set(ints_of(steps) or [0]) == {1}
    return forward and width_of(source) > 0 and dims_of(source) == dims_of(node.outputs[0])


def _gathered(node: ir.Node) -> tuple[int, int] | None:
    """Return the axis of features and the first index of a Gather of neighbours in their order."""
    source, indices = operand(node, 0), ints_of(operand(node, 1))
    axis = _feature_axis(source, node.attributes.get_int("axis", 0))
    if axis is None or not indices:
        return None
    size = features_of(source)[axis]
    start, count = indices[0] % size, len(indices)
    ordered = [i % size for i in indices] == list(range(start, start + count))
    return (axis, start) if ordered and rank_of(operand(node, 1)) <= 1 else None


def _feature_axis(value: ir.Value, axis: int) -> int | None:
    """Return the index among `features_of` a value of its dimension `axis`; None for tokens and sequences."""
    features, rank = features_of(value), rank_of(value)
    if not features:
        return None
    axis %= rank
    if is_turned(value):
        return 0 if axis == 1 else None
    index = axis - (rank - len(features))
    flattened = len(features) == rank
    return None if index < (1 if flattened else 0) else index


def _around(value: ir.Value, axis: int) -> tuple[int, int]:
    """Return how many parts of a row an axis divides it into, and the number of features of each."""
    features = features_of(value)
    return math.prod(features[:axis]), math.prod(features[axis:])


def _cut(builder: RegionBuilder, source: ir.Value, output: ir.Value, axis: int, start: int) -> None:
    """Take `output` from the indices of `source` along `axis` that begin with `start`."""
    place = builder.place(source)
    outer, step = _around(source, axis)
    width = width_of(output) // outer
    first = start * (step // features_of(source)[axis])
    if outer == 1:
        builder.alias(output, place.part(first, width))
    else:
        out = builder.make(output, outer * width, space_of(output))
        _copy_parts(builder, place.part(first, width), out, (outer, width, step, width))


def _copy_parts(builder: RegionBuilder, source: RowPlace, out: RowPlace, sizes: tuple[int, ...]) -> None:
    """Copy parts of rows; `sizes` are their number, their width, and the distances from part to part."""
    row = f"copy_parts_row<{', '.join(map(str, sizes))}>"
    builder.program.operations.append(Operation("row", source.space, {"row": row, "a": source, "out": out}))
