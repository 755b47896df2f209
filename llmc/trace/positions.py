"""Determine how many positions a model has, where they begin, and which padding of ragged batches they allow.

A model derives the position of a token either from `position_ids`, or from the slot that it takes in the
cache: a range of the step's length, or a slice of a table of positions. If slots are only compared with each
other, they form a mask, which is right for any padding that is masked too. If slots become numbers, or select
rows of a table, they are positions, and padding shifts them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from llmc.architecture import padding_without_position
from llmc.graph.match import constant_of, input_of
from llmc.graph.model import Placeholder

if TYPE_CHECKING:
    import torch

_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})
#: Operators for which only the first input has elements that matter; the others are sizes, axes and bounds.
_FIRST_ONLY = frozenset(
    {"Reshape", "Expand", "Slice", "Unsqueeze", "Squeeze", "Tile", "Split", "Pad"}
    | {"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"}
)

#: Names under which configurations state their model's number of positions.
_STATED = ("max_position_embeddings", "max_target_positions", "max_seq_len", "max_sequence_length")


def stated_positions(config: Any) -> int | None:
    """Return the number of positions that a transformers configuration states; None if it states none."""
    text = config.get_text_config(decoder=True)
    values = (getattr(text, name, None) for name in _STATED)
    return next((n for n in values if isinstance(n, int) and n > 0), None)


def first_position(model: torch.nn.Module) -> int:
    """Return the position that the model gives the first token, unless it is given positions.

    Models derived from fairseq begin after the row of their table that belongs to padding; llmc counts
    positions from 0.
    """
    padding = padding_without_position(model)
    return 0 if padding is None else padding + 1


def table_positions(graph: ir.Graph) -> int | None:
    """Return the number of positions in the graph's smallest table of positions; None without a table."""
    rows = []
    for node in graph:
        data = node.inputs[0] if node.inputs else None
        if node.op_type in ("Gather", "GatherElements") and _is_stored(data):
            axis = node.attributes.get_int("axis", 0)
            offset = _offset(node.inputs[1])
        elif _cuts_a_table(node):
            axes = constant_of(input_of(node, 3))
            axis, offset = (int(axes.numpy()[0]) if axes is not None else 0), 0
        else:
            continue
        size = data.shape[axis] if data is not None and data.shape is not None else None
        if offset is not None and isinstance(size, int) and size > 1:
            rows.append(size - offset)
    return min(rows, default=None)


def _offset(value: ir.Value | None) -> int | None:
    """Return the offset of `value` from the positions; None if it is not derived from positions."""
    offset = 0
    while value is not None:
        node = value.producer()
        if node is None:
            return offset if value.name == "position_ids" else None
        if node.op_type == "Range":
            return offset
        if node.op_type in ("Add", "Sub"):
            first, second = node.inputs
            if node.op_type == "Add" and constant_of(first) is not None:
                first, second = second, first
            term = constant_of(second)
            if term is not None:
                if term.size != 1:
                    return None
                offset += int(term.numpy().reshape(())) * (1 if node.op_type == "Add" else -1)
            value = first
        elif node.op_type in ("Cast", "Unsqueeze", "Squeeze", "Expand", "Reshape", "Tile", "Identity"):
            value = node.inputs[0]
        else:
            return None
    return None


def padding_side(graph: ir.Graph, *, windowed: bool) -> Literal["left", "any", "none"]:
    """Return the side on which batches for this graph may be padded.

    Args:
        windowed: Whether the graph builds the mask of a sliding window from slots, so that padding between
            real tokens would take up room in the window.

    Returns:
        "none" if positions are slots; "left" if a window counts slots; otherwise "any".
    """
    slots: set[ir.Value] = set()
    for node in graph:
        if _makes_slots(node) or any(v in slots for v in _element_inputs(node)):
            kinds = {output.dtype for output in node.outputs}
            if kinds & _FLOATS:
                return "none"
            if kinds & _INTEGERS:
                slots.update(node.outputs)
        elif _cuts_a_table(node):
            return "none"
        windowed = windowed or _cuts_a_window(node)
    return "left" if windowed else "any"


def _element_inputs(node: ir.Node) -> list[ir.Value | None]:
    """List the inputs whose elements, rather than sizes, affect the result."""
    if node.op_type in ("Shape", "Size", "ConstantOfShape"):
        return []
    return list(node.inputs[:1] if node.op_type in _FIRST_ONLY else node.inputs)


def _makes_slots(node: ir.Node) -> bool:
    """Return whether a node makes a range of dynamic length, or slices a constant of integers at run time."""
    if node.op_type == "Range":
        return any(constant_of(v) is None for v in node.inputs)
    return _cut(node) is not None and node.outputs[0].dtype in _INTEGERS


def _cuts_a_table(node: ir.Node) -> bool:
    """Return whether a node slices numbers from a constant or a weight at a position known at run time."""
    return _cut(node) is not None and node.outputs[0].dtype in _FLOATS


def _cuts_a_window(node: ir.Node) -> bool:
    """Return whether a node slices a mask at run time from a table that hides more than the future."""
    source = _cut(node)
    table = constant_of(source)
    if table is None or node.outputs[0].dtype != ir.DataType.BOOL:
        return False
    mask = table.numpy()
    if mask.ndim < 2:
        return False
    causal = np.broadcast_to(np.tri(*mask.shape[-2:]) > 0, mask.shape)
    return not np.array_equal(mask, causal)


def _cut(node: ir.Node) -> ir.Value | None:
    """Return the constant or weight that `node` slices from a start known only at run time."""
    if node.op_type != "Slice" or len(node.inputs) < 3:
        return None
    source, start = node.inputs[0], node.inputs[1]
    if source is None or constant_of(start) is not None:
        return None
    return source if _is_stored(source) else None


def _is_stored(value: ir.Value | None) -> bool:
    """Return whether `value` is a weight or a constant."""
    return value is not None and (
        constant_of(value) is not None or isinstance(value.const_value, Placeholder)
    )
