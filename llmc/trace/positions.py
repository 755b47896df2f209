"""Positions: how many a model knows, where they begin, and what that means for ragged batches.

A model places a token either by `position_ids`, or by the slot that it takes in the cache: a range of
the step's length, a cut out of a table of positions. Slots compared with each other make a mask, which
is right wherever the padding stands as long as it is masked too. Slots that become numbers, or look up a
row of a table, are positions, and count the padding along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from llmc.graph.match import constant_of, input_of
from llmc.graph.model import Placeholder

if TYPE_CHECKING:
    import torch

_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})
#: Operators of whose inputs only the first has elements that matter; the rest are sizes, axes and bounds.
_FIRST_ONLY = frozenset(
    {"Reshape", "Expand", "Slice", "Unsqueeze", "Squeeze", "Tile", "Split", "Pad"}
    | {"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"}
)

#: Names under which configurations state how many positions their model knows.
_STATED = ("max_position_embeddings", "max_target_positions", "max_seq_len", "max_sequence_length")


def stated_positions(config: Any) -> int | None:
    """How many positions a transformers configuration states; None if it states none."""
    text = config.get_text_config(decoder=True)
    found = (getattr(text, name, None) for name in _STATED)
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def first_position(model: torch.nn.Module) -> int:
    """The position that the model gives the first token.

    Models after fairseq keep a row of their table of positions for padding, and begin after it
    (`padding_idx + 1`), unless they are told positions; ours are counted from 0.
    """
    import torch

    tokens = model.get_input_embeddings()  # type: ignore[operator]
    count = stated_positions(model.config)
    for module in model.modules():
        if not isinstance(module, torch.nn.Embedding) or module is tokens:
            continue
        if module.num_embeddings == count and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def table_positions(graph: ir.Graph) -> int | None:
    """How many positions the graph's smallest table of them has rows for; None without a table."""
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
    """What is added to positions to get `value`; None if it is not made of positions."""
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
    """The side that this graph may be padded on.

    Args:
        windowed: The graph builds the mask of a sliding window from slots, so that padding between
            real tokens would take up room in it.

    Returns:
        "none" if positions are slots; "left" if a window counts slots; else "any".
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
    """The inputs whose elements, not sizes, matter to the result."""
    if node.op_type in ("Shape", "Size", "ConstantOfShape"):
        return []
    return list(node.inputs[:1] if node.op_type in _FIRST_ONLY else node.inputs)


def _makes_slots(node: ir.Node) -> bool:
    """A range of dynamic length, or integers cut at a dynamic place out of a constant."""
    if node.op_type == "Range":
        return any(constant_of(v) is None for v in node.inputs)
    return _cut(node) is not None and node.outputs[0].dtype in _INTEGERS


def _cuts_a_table(node: ir.Node) -> bool:
    """Numbers cut at a dynamic place out of a constant or a weight."""
    return _cut(node) is not None and node.outputs[0].dtype in _FLOATS


def _cuts_a_window(node: ir.Node) -> bool:
    """A mask cut at a dynamic place out of a table that hides more than the future."""
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
    """The constant or weight that `node` slices from a start that is known only at run time."""
    if node.op_type != "Slice" or len(node.inputs) < 3:
        return None
    source, start = node.inputs[0], node.inputs[1]
    if source is None or constant_of(start) is not None:
        return None
    return source if _is_stored(source) else None


def _is_stored(value: ir.Value | None) -> bool:
    """Whether `value` is a weight or a constant."""
    return value is not None and (
        constant_of(value) is not None or isinstance(value.const_value, Placeholder)
    )
