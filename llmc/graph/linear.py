"""Find linear products and embeddings of a graph, where its weights are used."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir

from llmc.config import WeightRole
from llmc.graph.match import behind, is_op
from llmc.graph.model import Graph
from llmc.graph.weights import LazyWeight


@dataclass(frozen=True)
class Linear:
    """A product of an activation with a weight matrix.

    Args:
        node: The `MatMul`.
        weight: The initializer, (out_features, in_features) if `transposed`, otherwise (in_features,
            out_features).
        transposed: Whether the weight passes through a `Transpose` node, as torch stores linear layers.
        role: The product's role: language-model head, router, projection into the residual stream, or other.
    """

    node: ir.Node
    weight: ir.Value
    transposed: bool
    role: WeightRole

    @property
    def activation(self) -> ir.Value:
        """The value that the node reads now, (…, in_features); a new one once its producer is replaced."""
        return cast(ir.Value, self.node.inputs[0])

    @property
    def in_features(self) -> int:
        return int(self._dims[1 if self.transposed else 0])

    @property
    def out_features(self) -> int:
        return int(self._dims[0 if self.transposed else 1])

    @property
    def _dims(self) -> tuple[int, ...]:
        return tuple((self.weight.shape or ir.Shape([])).numpy())

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]


@dataclass(frozen=True)
class Embedding:
    """A lookup of rows: `Gather` along axis 0 of a weight (entries, width)."""

    node: ir.Node
    weight: ir.Value
    indices: ir.Value


def as_linear(node: ir.Node) -> Linear | None:
    """Return the linear product that `node` computes; None if it is not a product with a weight matrix."""
    if not is_op(node, "MatMul") or len(node.inputs) != 2:
        return None
    activation, factor = node.inputs
    matrix = matrix_behind(factor)
    if activation is None or matrix is None:
        return None
    return Linear(node, *matrix, _role(node))


def matrix_behind(factor: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """Return the weight matrix that is a product's second factor, and whether it is transposed first."""
    if factor is None:
        return None
    weight = behind(factor, "Transpose")
    return (weight, weight is not factor) if is_weight(weight) and len(weight.shape or ()) == 2 else None


def find_linears(graph: Graph) -> Iterator[Linear]:
    """Yield every linear product, in graph order."""
    for node in graph.graph:
        linear = as_linear(node)
        if linear is not None:
            yield linear


def find_embeddings(graph: Graph) -> Iterator[Embedding]:
    """Yield every lookup of a weight's rows by token ids, in graph order.

    GPT-2 and OPT pass their ids through a Reshape that does not change the shape, and multimodal models
    replace the ids that stand for images.
    """
    ids = {v for v in graph.graph.inputs if v.name == "input_ids"}
    shape = next((v.shape for v in ids), None)
    for node in graph.graph:
        if (
            node.op_type in _SAME_TOKENS
            and not ids.isdisjoint(node.inputs)
            and node.outputs[0].shape == shape
        ):
            ids.update(v for v in node.outputs[:1] if v.dtype == ir.DataType.INT64)
        if not is_op(node, "Gather") or node.attributes.get_int("axis", 0) != 0:
            continue
        weight, indices = node.inputs
        if weight is not None and indices in ids and is_weight(weight):
            yield Embedding(node, weight, indices)


def is_weight(value: ir.Value) -> bool:
    """Return whether `value` is a parameter of the model, rather than a constant or an activation."""
    return isinstance(value.const_value, LazyWeight)


#: Operators whose result still has an id for each token.
_SAME_TOKENS = frozenset({"Reshape", "ScatterND", "Where"})
#: Operators between the head and the logits, and between a projection and the sum with its residual.
_TO_LOGITS = frozenset({
    "Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Slice", "Where", "Clip", "Min", "Max",
})  # fmt: skip
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_SUMS = frozenset({"Add", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
#: Operators between a router and its choice.
_TO_CHOICE = frozenset({"Add", "Mul", "Div", "Cast", "Reshape", "Softmax", "Sigmoid", "Sqrt", "Softplus"})


def _role(node: ir.Node) -> WeightRole:
    """Determine the role of the product from the operators that its result passes through."""
    if _reaches_choice(node.outputs[0], 8):
        return WeightRole.ROUTER
    value, residual = node.outputs[0], True
    for _ in range(8):
        if value.name == "logits":
            return WeightRole.LM_HEAD
        users = set(value.consumers())
        if len(users) != 1:
            return WeightRole.LINEAR
        user = users.pop()
        others = [i for i in user.inputs if i is not None and i is not value and i.const_value is None]
        if residual and user.op_type in _SUMS and others:
            return WeightRole.RESIDUAL
        residual = residual and (user.op_type in _NORMS or (user.op_type in _TO_LOGITS and not others))
        if not residual and user.op_type not in _TO_LOGITS:
            return WeightRole.LINEAR
        value = user.outputs[0]
    return WeightRole.LINEAR


def _reaches_choice(value: ir.Value, steps: int) -> bool:
    """Return whether a TopK chooses by a value computed from `value` within `steps` operators."""
    users = set(value.consumers())
    return any(user.op_type == "TopK" for user in users) or (
        steps > 0
        and any(_reaches_choice(user.outputs[0], steps - 1) for user in users if user.op_type in _TO_CHOICE)
    )
