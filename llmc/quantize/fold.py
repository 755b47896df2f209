"""Find activations that several products read, and where their channels can be scaled at no cost.

A product does not change if a channel of its input is divided by a factor and the matching inputs of its
weights are multiplied by it. The division costs nothing if it can be folded into the node that computes the
activation: the weight of a norm, or the outputs of the linear layer whose result a gate multiplies
(SmoothQuant, Xiao et al. 2023; AWQ, Lin et al. 2024).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.graph.linear import Linear, as_linear, find_linears
from llmc.graph.match import lazy_of
from llmc.graph.model import Graph
from llmc.graph.weights import LazyWeight, ScaledRows, WeightGroup

#: Norms, and the index of their first weight; norms of com.microsoft with the residual sum have two more
#: inputs.
_NORMS = {
    "RMSNormalization": 1,
    "LayerNormalization": 1,
    "SimplifiedLayerNormalization": 1,
    "SkipSimplifiedLayerNormalization": 2,
    "SkipLayerNormalization": 2,
}


@dataclass(frozen=True)
class Factor:
    """The part of a weight that is divided: entries start:stop along `axis`."""

    weight: ir.Value
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class SharedInput:
    """The activation (…, K) that linear products read, with these products.

    Args:
        value: The activation.
        linears: The products, in graph order.
        factors: The parts of weights that are divided when its channels are; empty if they cannot be.
    """

    value: ir.Value
    linears: tuple[Linear, ...]
    factors: tuple[Factor, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The checkpoint's names of the weights."""
        return tuple(s for linear in self.linears for s in lazy_of(linear.weight).sources)


def find_shared_inputs(graph: Graph) -> list[SharedInput]:
    """Find every activation that a linear product reads, in graph order."""
    groups: dict[ir.Value, list[Linear]] = {}
    for linear in find_linears(graph):
        groups.setdefault(linear.activation, []).append(linear)
    return [
        SharedInput(value, tuple(linears), tuple(_factors(value, linears)))
        for value, linears in groups.items()
    ]


def scale_channels(shared: SharedInput, factors: Array) -> None:
    """Divide the channels of an activation by `factors` (K,), and multiply its weights' inputs by them."""
    for part in shared.factors:
        size = lazy_of(part.weight).shape.numpy()[part.axis]
        whole = np.ones(size, np.float32)
        whole[part.start : part.stop] = 1 / factors
        _scale(part.weight, whole, part.axis)
    for linear in shared.linears:
        _scale(linear.weight, factors.astype(np.float32), 1 if linear.transposed else 0)


def scale_graph(graph: Graph, vectors: Mapping[str, Array]) -> None:
    """Scale the channels of activations by `vectors`, each found by a weight that reads its activation."""
    for shared in find_shared_inputs(graph):
        factors = next((vectors[s] for s in shared.sources if s in vectors), None)
        if factors is not None:
            scale_channels(shared, factors)


def describe_scaling(count: int) -> str:
    """Return a sentence on activations whose channels are scaled, for people who compare weights."""
    return (
        f"the channels of {count} activations are scaled (SmoothQuant, AWQ): norms and other weights in "
        "front of them are divided by factors and the weights that read them multiplied, so that "
        "products are the same and these weights are not the checkpoint's"
    )


def _scale(weight: ir.Value, factors: Array, axis: int) -> None:
    tensor = lazy_of(weight)
    if tensor.rows is not None:
        weight.const_value = LazyWeight.from_rows(str(weight.name), ScaledRows(tensor.rows, factors, axis))
        return

    def compute() -> dict[str, Array]:
        value = tensor.group.compute()[tensor.key]
        return {"value": (value.astype(np.float32) * factors).astype(value.dtype)}

    weight.const_value = LazyWeight(
        name=str(weight.name),
        dtype=tensor.dtype,
        shape=tensor.shape.numpy(),
        group=WeightGroup(tensor.sources, compute),
        key="value",
    )


def _factors(value: ir.Value, linears: list[Linear]) -> Iterator[Factor]:
    """Yield the factors of `value`; none if it has other readers or one of the weights has other uses."""
    if not set(value.consumers()) <= {linear.node for linear in linears}:
        return
    if value.is_graph_output() or any(len(tuple(_users(linear))) != 1 for linear in linears):
        return
    node, last = value.producer(), value
    while node is not None and node.op_type == "Cast" and len(tuple(node.inputs[0].uses())) == 1:  # type: ignore[union-attr]
        last = cast(ir.Value, node.inputs[0])
        node = last.producer()
    if node is None:
        return
    if node.op_type in _NORMS:
        if last is node.outputs[0]:  # not the residual sum
            yield from _of_norm(node)
    elif node.op_type == "Mul":
        for operand in node.inputs:
            factor = None if operand is None else _of_product(operand)
            if factor is not None:
                yield factor
                return


def _users(linear: Linear) -> Iterator[ir.Node]:
    """Yield the nodes that read the weight, through the Transpose in front of a product."""
    for user, _ in linear.weight.uses():
        yield from (u for u, _ in user.outputs[0].uses()) if user.op_type == "Transpose" else (user,)


def _of_norm(node: ir.Node) -> Iterator[Factor]:
    first = _NORMS[node.op_type]
    weights = [w for w in node.inputs[first : first + 2] if w is not None]
    if not weights or any(not _is_own(w) for w in weights):
        return
    for weight in weights:
        yield Factor(weight, 0, 0, lazy_of(weight).shape.numpy()[0])


def _is_own(weight: ir.Value) -> bool:
    """Return whether `weight` is a vector of the model that only one node reads."""
    return (
        isinstance(weight.const_value, LazyWeight)
        and len(weight.shape or ()) == 1
        and len(weight.uses()) == 1
    )


def _of_product(value: ir.Value) -> Factor | None:
    """Return the outputs of the linear product that `value` is, or is a part of, without nodes in between."""
    if len(value.uses()) != 1 or value.is_graph_output():
        return None
    node, start = value.producer(), 0
    if node is None:
        return None
    stop: int | None = None
    if node.op_type == "Split":
        widths = [output.shape[-1] if output.shape else None for output in node.outputs]
        last = node.attributes.get_int("axis", 0) in (-1, len(value.shape or ()) - 1)
        if not last or not all(isinstance(width, int) for width in widths):
            return None
        edges = np.cumsum([0, *widths])
        place = list(node.outputs).index(value)
        start, stop = int(edges[place]), int(edges[place + 1])
        joined = cast(ir.Value, node.inputs[0])
        node = joined.producer() if len(joined.uses()) == 1 else None
    linear = as_linear(node) if node is not None else None
    if linear is None or len(tuple(_users(linear))) != 1:
        return None
    return Factor(linear.weight, 0 if linear.transposed else 1, start, stop or linear.out_features)
