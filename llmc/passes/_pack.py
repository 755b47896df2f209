"""Join several linear products of one activation into one product with concatenated weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from llmc.graph.edit import Site, add_weight
from llmc.graph.linear import Linear, as_linear, is_weight
from llmc.graph.match import dims_of, is_op, only_user
from llmc.graph.weights import ConcatRows, LazyWeight, Rows, code_form


@dataclass(frozen=True)
class Projection:
    """A linear product and the bias that is added to it, if any; other nodes read `output`."""

    linear: Linear
    bias: ir.Value | None
    output: ir.Value


def projection_of(value: ir.Value | None) -> Projection | None:
    """Return the projection that computes `value`; None if something else does."""
    node = None if value is None else value.producer()
    if value is None or node is None:
        return None
    linear = as_linear(node)
    if linear is not None:
        return Projection(linear, None, value)
    if not is_op(node, "Add"):
        return None
    for product, bias in (node.inputs, node.inputs[::-1]):
        node_before = None if product is None else product.producer()
        inner = None if node_before is None else as_linear(node_before)
        if inner is not None and bias is not None and is_weight(bias) and only_user(inner.output) is node:
            return Projection(inner, bias, value)
    return None


def joining_obstacle(projections: Sequence[Projection]) -> tuple[str, str] | None:
    """Return (code, reason) why these projections cannot be joined; None if they can."""
    if len({p.linear.activation for p in projections}) != 1:
        return "activation", "they read different activations"
    if not all(p.linear.transposed for p in projections):
        return "layout", "their weights are stored with input features first"
    if len({p.bias is None for p in projections}) != 1:
        return "bias", "only some of them have a bias"
    if any(_rows(v) is None for p in projections for v in (p.linear.weight, p.bias) if v is not None):
        return "computed", "their weights are computed, not stored"
    return None


def differing_codes(projections: Sequence[Projection]) -> tuple[str, str] | None:
    """Return (code, reason) why one matrix would not keep the checkpoint's codes; None if it would."""
    rows = [_rows(p.linear.weight) for p in projections]
    if len({None if each is None else code_form(each) for each in rows}) > 1:
        return "codes", "the checkpoint quantizes them differently, and one matrix would widen some"
    return None


def join(graph: ir.Graph, anchor: ir.Node, projections: Sequence[Projection], suffix: str) -> ir.Value:
    """Replace `projections` by one product; return its output (…, sum of their output features).

    Args:
        anchor: The node before which new nodes are inserted.
        suffix: Last part of the joined weight's name, such as `qkv_proj`.
    """
    site = Site(graph, anchor)
    first = projections[0].linear
    stem = str(first.weight.name).rsplit(".", 2)[0]
    place = f"{first.output.name}/{suffix}"  # a model may run the layer that has the weight several times
    features = sum(p.linear.out_features for p in projections)
    weight = add_weight(graph, f"{stem}.{suffix}.weight", _concat([p.linear.weight for p in projections]))
    shape = [*dims_of(first.output)[:-1], features]
    turned = site.emit(
        "Transpose",
        [weight],
        f"{place}/weight",
        attributes={"perm": [1, 0]},
        shape=[first.in_features, features],
        dtype=weight.dtype,
    ).outputs[0]
    dtype = first.output.dtype
    product = site.emit("MatMul", [first.activation, turned], f"{place}/product", shape=shape, dtype=dtype)
    biases = [p.bias for p in projections if p.bias is not None]
    if not biases:
        return product.outputs[0]
    bias = add_weight(graph, f"{stem}.{suffix}.bias", _concat(biases))
    return site.emit("Add", [product.outputs[0], bias], f"{place}/biased", shape=shape, dtype=dtype).outputs[
        0
    ]


def _rows(value: ir.Value) -> Rows | None:
    tensor = value.const_value
    return tensor.rows if isinstance(tensor, LazyWeight) else None


def _concat(values: Sequence[ir.Value]) -> ConcatRows:
    return ConcatRows(tuple(rows for v in values if (rows := _rows(v)) is not None))
