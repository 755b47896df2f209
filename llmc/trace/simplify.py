"""Simplify the exporter's output for dynamic shapes without reading any weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from llmc.graph.edit import set_value
from llmc.graph.match import constant_of, find_nodes, input_of, made_by, operand, scalar_of
from llmc.graph.model import Placeholder
from llmc.trace.scatter import drop_whole_copies, join_parts, mask_places

#: Upper limit in bytes of constants that are folded while simplifying.
_FOLD_BYTES = 64 * 1024
#: Input from which on softplus is its input in float32.
_STABLE = 16.0


def simplify(model: ir.Model) -> None:
    """Fold constants, make reshapes static, remove duplicates and dead nodes; in place."""
    from onnx_ir.passes import common

    weights = _hide_weights(model.graph)
    for node in list(model.graph):
        _fold_dimension(node)
    _fold(model)
    common.ShapeInferencePass()(model)
    for node in list(model.graph):
        _make_reshape_static(node)
        _make_cast_constant(node)
        _drop_neutral(node)
    for node in find_nodes(model.graph, "Where"):
        _drop_threshold(node)
    join_parts(model.graph)
    drop_whole_copies(model.graph)
    mask_places(model.graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    common.DeduplicateInitializersPass(size_limit=_FOLD_BYTES)(model)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _restore_weights(model.graph, weights)


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads; in place."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)


def _hide_weights(graph: ir.Graph) -> dict[str, ir.Value]:
    """Turn weights into plain inputs, so that no optimiser asks for their data."""
    weights = {n: v for n, v in graph.initializers.items() if isinstance(v.const_value, Placeholder)}
    for name, value in weights.items():
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    return weights


def _restore_weights(graph: ir.Graph, weights: dict[str, ir.Value]) -> None:
    for name, value in weights.items():
        graph.inputs.remove(value)
        if value.shape is None or value.dtype is None or not value.uses():
            continue
        value.const_value = Placeholder(name, value.dtype, tuple(value.shape.numpy()))
        graph.register_initializer(value)


def _fold(model: ir.Model) -> None:
    from onnxscript import optimizer

    optimizer.fold_constants(
        model, onnx_shape_inference=False, input_size_limit=_FOLD_BYTES, output_size_limit=_FOLD_BYTES
    )


def _fold_dimension(node: ir.Node) -> None:
    """Replace the element of a shape by a constant if that dimension is known."""
    shape = node.inputs[0].producer() if node.op_type == "Gather" and node.inputs[0] is not None else None
    index = constant_of(node.inputs[1]) if shape is not None else None
    if shape is None or shape.op_type != "Shape" or index is None or index.shape.rank():
        return
    if shape.attributes.get_int("start", 0) or "end" in shape.attributes:
        return
    source = shape.inputs[0]
    dim = source.shape[int(index.numpy())] if source is not None and source.shape is not None else None
    graph = node.graph
    if not isinstance(dim, int) or graph is None:
        return
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.array(dim, np.int64)))])
    graph.insert_before(node, constant)
    ir.convenience.replace_all_uses_with(node.outputs[0], constant.outputs[0])


def _make_reshape_static(node: ir.Node) -> None:
    """Replace a computed target shape by a constant with 0 (copy) and at most one -1 (infer)."""
    if node.op_type != "Reshape" or node.domain != "":
        return
    source, target = node.inputs[0], node.outputs[0]
    if source is None or target.shape is None or constant_of(node.inputs[1]) is not None:
        return
    dims = static_shape(list(source.shape or ()), list(target.shape))
    graph = node.graph
    if dims is None or graph is None:
        return
    tensor = ir.tensor(np.array(dims, dtype=np.int64))
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
    set_value(constant.outputs[0], f"{target.name}_shape", [len(dims)], ir.DataType.INT64)
    graph.insert_before(node, constant)
    node.replace_input_with(1, constant.outputs[0])
    node.attributes.pop("allowzero", None)


def _make_cast_constant(node: ir.Node) -> None:
    """Replace the cast of a constant to a known type by a constant of that type."""
    like = input_of(node, 1) if node.op_type == "CastLike" else None
    tensor = constant_of(node.inputs[0]) if like is not None else None
    graph = node.graph
    if like is None or like.dtype is None or tensor is None or graph is None or tensor.size > 1:
        return
    array = tensor.numpy().astype(like.dtype.numpy())
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array))])
    set_value(constant.outputs[0], f"{node.outputs[0].name}_value", array.shape, like.dtype)
    graph.insert_before(node, constant)
    ir.convenience.replace_all_uses_with(node.outputs[0], constant.outputs[0])


def _drop_threshold(node: ir.Node) -> None:
    """Drop the threshold of torch's softplus, beyond which it returns its input: the operator is stable.

    softplus(x) is Where(x > 20, x, Softplus(x)); beyond 20 the two differ by less than exp(-20).
    """
    condition, x, plus = node.inputs
    greater, soft = made_by(condition, "Greater"), made_by(plus, "Softplus")
    if greater is None or soft is None or x is None or plus is None or soft.inputs[0] is not x:
        return
    threshold = scalar_of(greater.inputs[1])
    if greater.inputs[0] is x and threshold is not None and threshold >= _STABLE:
        ir.convenience.replace_all_uses_with(node.outputs[0], plus)


def static_shape(
    source: Sequence[int | ir.SymbolicDim], target: Sequence[int | ir.SymbolicDim]
) -> list[int] | None:
    """Return the `Reshape` target for a dynamic `target`: 0 copies the dimension at the same position.

    Return None if more than one dimension would have to be inferred, or one is empty.
    """
    if 0 in target:
        return None
    dims: list[int] = []
    for position, dim in enumerate(target):
        if isinstance(dim, int):
            dims.append(dim)
        elif position < len(source) and str(source[position]) == str(dim):
            dims.append(0)
        else:
            dims.append(-1)
    return dims if dims.count(-1) <= 1 else None


def _drop_neutral(node: ir.Node) -> None:
    """Forward the input of casts to the same type, products with 1 and sums with 0."""
    source = node.inputs[0] if node.inputs else None
    if source is None or node.domain != "" or node.outputs[0].is_graph_output():
        return
    if node.op_type == "Cast":
        neutral = source.dtype is not None and node.attributes["to"].as_int() == source.dtype
    elif node.op_type in ("Mul", "Div", "Add", "Sub"):
        tensor = constant_of(node.inputs[1])
        neutral = (
            tensor is not None
            and tensor.size == 1
            and float(tensor.numpy().reshape(())) == (1.0 if node.op_type in ("Mul", "Div") else 0.0)
            and source.shape is not None
            and tensor.shape.rank() <= len(source.shape)
        )
    elif node.op_type == "Slice":
        neutral = _keeps_everything(node, source)
    elif node.op_type == "Unsqueeze":
        squeezed = made_by(source, "Squeeze")
        source = source if squeezed is None else operand(squeezed, 0)
        neutral = squeezed is not None and _same_shape(source, node.outputs[0])
    elif node.op_type == "Expand":
        neutral = _same_shape(source, node.outputs[0])
    else:
        neutral = False
    if neutral:
        ir.convenience.replace_all_uses_with(node.outputs[0], source, replace_graph_outputs=False)


def _keeps_everything(node: ir.Node, source: ir.Value) -> bool:
    """Return whether a slice keeps every element: in steps of 1, from 0 to the end or to as many."""
    stride = constant_of(input_of(node, 4))
    forwards = len(node.inputs) < 5 or (stride is not None and bool((stride.numpy() == 1).all()))
    if forwards and _same_shape(source, node.outputs[0]):
        return True
    bounds = [constant_of(v) for v in node.inputs[1:]]
    if len(bounds) < 2 or any(b is None for b in bounds) or source.shape is None:
        return False
    starts, ends, *rest = ([int(x) for x in b.numpy().reshape(-1)] for b in bounds if b is not None)
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        dim = source.shape[axis]
        length = dim if isinstance(dim, int) else np.iinfo(np.int64).max
        if start != 0 or step != 1 or end < length:
            return False
    return True


def _same_shape(first: ir.Value, second: ir.Value) -> bool:
    """Return whether two values have the same known shape, symbolic dimensions by their names."""
    if first.shape is None or second.shape is None:
        return False
    dims = [[str(d) for d in value.shape or ()] for value in (first, second)]
    return dims[0] == dims[1] and "None" not in dims[0]
