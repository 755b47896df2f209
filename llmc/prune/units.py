"""Find neurons and groups of heads: the units of a layer that can be left out, and the weights they are in.

A unit is a run of channels that nothing mixes with other channels between the weights that produce it and the
projection that reads it: one neuron of an MLP, or the query heads that share a key and a value, with these.
Units are found in the traced graph, by following the input of a projection back to where its layer computes
it. Operators that work on each channel by itself pass units on, a product with a matrix produces them, and
anything else that reads one of their channels prevents leaving any out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.config import WeightRole
from llmc.errors import UnsupportedError
from llmc.graph import dialect
from llmc.graph.domains import DIALECT
from llmc.graph.linear import Linear, find_linears, is_weight, matrix_behind
from llmc.graph.match import constant_of, input_of, is_op
from llmc.graph.model import Graph, layer_of

#: Operators that compute each element from the elements at the same place.
_ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "Cast", "Clip", "Cos", "Div", "Erf", "Exp", "Gelu", "Identity", "Max", "Min", "Mul",
        "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sin", "Softplus", "Sqrt", "Sub", "Tanh", "Where",
    }
)  # fmt: skip
#: Operators that work along one axis, by the attribute that names it; nothing moves along other axes.
_ALONG = {"Concat": 0, "Split": 0, "LayerNormalization": -1, "RMSNormalization": -1}
#: Operators that select or sum entries of the axes that an input names.
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceMax"})


@dataclass(frozen=True)
class UnitSlice:
    """The place of units in a parameter: entry k of unit u is at start + (u * width + k) * step of `axis`."""

    parameter: str
    axis: int
    start: int
    step: int
    width: int

    def indices(self, units: Array) -> Array:
        """Return the indices along `axis` that belong to `units`, int64."""
        entries = units[:, None] * self.width + np.arange(self.width)
        indices: Array = (self.start + entries * self.step).reshape(-1).astype(np.int64)
        return indices


@dataclass(frozen=True)
class Units:
    """The units of one layer.

    Args:
        layer: Index of the decoder layer.
        count: Number of units.
        reader: The projection that reads them: its weight and the axis of its inputs.
        makers: Weights and biases that produce them.
        heads: Heads of each unit; 0 for neurons.
    """

    layer: int
    count: int
    reader: UnitSlice
    makers: tuple[UnitSlice, ...]
    heads: int = 0

    @property
    def parts(self) -> tuple[UnitSlice, ...]:
        """The parameters that a unit is removed from."""
        return (*self.makers, self.reader)


@dataclass(frozen=True)
class Structure:
    """The units of a model, and why projections have none.

    Args:
        neurons: Units of the MLPs, by layer.
        groups: Heads that share a key and a value, by layer.
        refused: Reason by the weight of each product that reads no units.
    """

    neurons: tuple[Units, ...]
    groups: tuple[Units, ...]
    refused: dict[str, str] = field(default_factory=dict)


def find_units(graph: Graph) -> Structure:
    """Find the units that each linear product of a layer reads."""
    neurons, groups, refused = [], [], {}
    for linear in find_linears(graph):
        layer = layer_of(linear.node)
        if layer is None:
            continue
        attention = _attention_behind(linear.activation)
        try:
            if attention is None:
                neurons.append(_follow(linear, layer, linear.in_features, 0))
            else:
                heads, kv_heads = (
                    attention.attributes[name].as_int() for name in ("num_heads", "kv_num_heads")
                )
                groups.append(_follow(linear, layer, kv_heads, heads // kv_heads))
        except _MixedError as error:
            refused[str(linear.weight.name)] = str(error)
    return Structure(tuple(neurons), tuple(groups), refused)


def find_matrices(graph: Graph) -> dict[str, bool]:
    """Return weights of the layers' linear products but routers, and whether outputs are the first axis."""
    return {
        str(linear.weight.name): linear.transposed
        for linear in find_linears(graph)
        if layer_of(linear.node) is not None and linear.role in (WeightRole.LINEAR, WeightRole.RESIDUAL)
    }


def require_units(units: tuple[Units, ...], layers: int, structure: Structure, what: str) -> None:
    """Check that every layer has units, and that all layers have equally many.

    Args:
        what: Name of the units in errors.

    Raises:
        UnsupportedError: A layer has no units or several kinds, or layers differ.
    """
    by_layer = [sum(u.layer == layer for u in units) for layer in range(layers)]
    wrong = next((layer for layer, found in enumerate(by_layer) if found != 1), None)
    if wrong is not None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in structure.refused.items())
        raise UnsupportedError(
            f"layer {wrong} has {by_layer[wrong]} projections whose {what} can be separated, and 1 is needed"
            + (f" ({reasons[:300]})" if reasons else ""),
            hint="leave this recipe out of the target, or drop whole layers",
        )
    if len({u.count for u in units}) != 1:
        raise UnsupportedError(
            f"the layers have different numbers of {what}: {sorted({u.count for u in units})}",
            hint="leave this recipe out of the target, or drop whole layers",
        )


class _MixedError(Exception):
    """The reason why units cannot be separated."""


@dataclass(frozen=True)
class _Place:
    """The units along `axis` of a value, counted from its last one (-1), with `width` entries each.

    `start` and `step` locate them in a value that holds other channels beside them.
    """

    axis: int
    width: int
    start: int = 0
    step: int = 1


def _attention_behind(value: ir.Value) -> ir.Node | None:
    """Return the attention whose result `value` is computed from, within a few operators."""
    front = [value]
    for _ in range(8):
        following = []
        for each in front:
            node = each.producer()
            if node is None or node.op_type == "MatMul":
                continue
            if is_op(node, dialect.CACHED_ATTENTION, DIALECT):
                return node
            following += [i for i in node.inputs if i is not None and i.const_value is None]
        front = following
    return None


def _follow(linear: Linear, layer: int, count: int, heads: int) -> Units:
    if linear.in_features % count:
        raise _MixedError(f"{linear.in_features} inputs do not divide evenly into {count} units")
    if len(linear.weight.uses()) != 1:
        raise _MixedError("its weight is used elsewhere as well")
    width = linear.in_features // count
    walk = _Walk(count, layer)
    walk.back(linear.activation, _Place(-1, width))
    walk.require_no_other_readers(linear.node)
    reader = UnitSlice(str(linear.weight.name), 1 if linear.transposed else 0, 0, 1, width)
    if not walk.parts:
        raise _MixedError("no matrix computes its inputs")
    return Units(layer, count, reader, tuple(dict.fromkeys(walk.parts)), heads)


class _Walk:
    """The walk that follows units back to the weights that produce them."""

    def __init__(self, count: int, layer: int) -> None:
        self.parts: list[UnitSlice] = []
        self._count = count
        self._layer = layer
        self._places: dict[ir.Value, _Place] = {}
        self._nodes: set[ir.Node] = set()

    def back(self, value: ir.Value, place: _Place) -> None:
        """Find what produces the units at `place` of `value`.

        Raises:
            _MixedError: The units cannot be separated there.
        """
        pending = [(value, place)]
        while pending:
            value, place = pending.pop()
            if is_weight(value):
                self._add(value, place, len(value.shape or ()) + place.axis)
                continue
            if value.const_value is not None:
                raise _MixedError(f"the constant {value.name} differs from unit to unit")
            previous = self._places.get(value)
            if previous == place:
                continue
            if previous is not None and place.start == previous.start:
                raise _MixedError(f"{value.name} is read in two ways")
            self._places[value] = place
            node = value.producer()
            if node is None or layer_of(node) != self._layer:
                raise _MixedError(f"{value.name} comes from outside of the layer")
            self._nodes.add(node)
            pending += self._inputs(node, value, place)

    def require_no_other_readers(self, reader: ir.Node) -> None:
        """Raise _MixedError if anything else reads the units."""
        for value in self._places:
            for user in value.consumers():
                if user is not reader and user not in self._nodes:
                    raise _MixedError(f"{user.op_type} reads {value.name} as well")

    def _add(self, weight: ir.Value, place: _Place, axis: int) -> None:
        if axis < 0:
            raise _MixedError(f"{weight.name} has no axis of units")
        self.parts.append(UnitSlice(str(weight.name), axis, place.start, place.step, place.width))

    def _inputs(self, node: ir.Node, value: ir.Value, place: _Place) -> Iterator[tuple[ir.Value, _Place]]:
        whole = place.start == 0 and place.step == 1
        if is_op(node, dialect.CACHED_ATTENTION, DIALECT):
            yield from self._of_attention(node, value, place)
        elif node.domain != "":
            raise _MixedError(f"{node.op_type} makes {value.name}")
        elif node.op_type in _ELEMENTWISE:
            yield from _broadcast(node, place, self._count)
        elif node.op_type == "MatMul":
            yield from self._of_product(node, place)
        elif node.op_type == "Transpose":
            order, rank = node.attributes["perm"].as_ints(), _rank(value)
            moved = order[rank + place.axis] - rank
            yield _data(node), _Place(moved, place.width, place.start, place.step)
        elif node.op_type == "Reshape" and whole:
            yield _data(node), _reshaped(value, _data(node), place, self._count)
        elif node.op_type in ("Slice", "Split", "Concat"):
            yield from _cut(node, value, place)
        elif node.op_type in _ALONG or node.op_type in _REDUCTIONS:
            if _works_along(node, value, place.axis):
                raise _MixedError(f"{node.op_type} mixes the channels of {value.name}")
            yield _data(node), place
        else:
            raise _MixedError(f"{node.op_type} makes {value.name}")

    def _of_product(self, node: ir.Node, place: _Place) -> Iterator[tuple[ir.Value, _Place]]:
        matrix = matrix_behind(node.inputs[1])
        if matrix is None or place.axis != -1:
            raise _MixedError("a product without a matrix of the model computes it")
        weight, transposed = matrix
        if len(weight.uses()) != 1:
            raise _MixedError(f"{weight.name} is used elsewhere as well")
        self._add(weight, place, 0 if transposed else 1)
        yield from ()

    def _of_attention(
        self, node: ir.Node, value: ir.Value, place: _Place
    ) -> Iterator[tuple[ir.Value, _Place]]:
        heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        if value is not node.outputs[0] or place != _Place(-2, heads // kv_heads):
            raise _MixedError("attention returns its heads in another order")
        if len(node.outputs[1].uses()) or len(node.outputs[2].uses()):
            raise _MixedError("another layer reads the keys and values")
        query, key, values = (v for v in node.inputs[:3] if v is not None)
        yield query, _Place(-3, heads // kv_heads)
        yield key, _Place(-3, 1)
        yield values, _Place(-3, 1)
        if len(node.inputs) > 6 and node.inputs[6] is not None:
            yield node.inputs[6], _Place(-1, heads // kv_heads)


def _data(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise _MixedError(f"{node.op_type} has no input")
    return value


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise _MixedError(f"{value.name} has no shape")
    return len(value.shape)


def _dim(value: ir.Value, axis: int) -> int | None:
    """Return the size of an axis, counted from the last one; 1 where it is absent, None if not fixed."""
    if -axis > _rank(value):
        return 1
    size = (value.shape or ())[axis]
    return size if isinstance(size, int) else None


def _broadcast(node: ir.Node, place: _Place, count: int) -> Iterator[tuple[ir.Value, _Place]]:
    """Yield the inputs of an element-wise operator that have the axis of units."""
    for value in node.inputs:
        if value is None:
            continue
        size = _dim(value, place.axis)
        if size is None or (size != 1 and size < count * place.width):
            raise _MixedError(f"{value.name} has {size} channels")
        if size > 1 or count * place.width == 1:
            yield value, place


def _reshaped(after: ir.Value, before: ir.Value, place: _Place, count: int) -> _Place:
    """Return where units are before a reshape that does not split them."""
    entries = place.width
    for axis in range(place.axis + 1, 0):
        size = _dim(after, axis)
        if size is None:
            raise _MixedError(f"{after.name} has no fixed shape behind its units")
        entries *= size
    inner = 1
    for axis in range(-1, -_rank(before) - 1, -1):
        size = _dim(before, axis)
        if size is None:
            break
        if size * inner == count * entries and entries % inner == 0:
            return _Place(axis, entries // inner)
        inner *= size
    raise _MixedError(f"a reshape splits the units of {after.name}")


def _cut(node: ir.Node, value: ir.Value, place: _Place) -> Iterator[tuple[ir.Value, _Place]]:
    """Yield the inputs of Slice, Split and Concat."""
    if not _works_along(node, value, place.axis):
        inputs = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        yield from ((each, place) for each in inputs if each is not None)
        return
    if node.op_type == "Concat":
        raise _MixedError(f"{value.name} is joined from several activations")
    if node.op_type == "Split":
        offset = 0
        for output in node.outputs:
            if output is value:
                break
            size = _dim(output, place.axis)
            if size is None:
                raise _MixedError(f"{output.name} has no fixed shape")
            offset += size
        start, step = offset, 1
    else:
        start, step = _slice_start(node)
    yield _data(node), _Place(place.axis, place.width, start + place.start * step, place.step * step)


def _slice_start(node: ir.Node) -> tuple[int, int]:
    """Return the first index and the step of a slice along one axis."""
    first, steps = (_ints(node, i) for i in (1, 4))
    step = steps[0] if steps else 1
    if not first or first[0] < 0 or step < 1:
        raise _MixedError("a slice with computed bounds selects them")
    return first[0], step


def _works_along(node: ir.Node, value: ir.Value, axis: int) -> bool:
    """Return whether an operator cuts, joins or mixes along `axis`, counted from the last one."""
    rank = _rank(value)
    if node.op_type == "Slice":
        axes = _ints(node, 3)
    elif node.op_type in _REDUCTIONS:
        axes = _ints(node, 1)
        if not node.attributes.get_int("keepdims", 1):
            raise _MixedError(f"{node.op_type} removes an axis")
    else:
        first = node.attributes.get_int("axis", _ALONG[node.op_type])
        normalizes = node.op_type.endswith("Normalization")
        axes = tuple(range(first - rank if first >= 0 else first, 0)) if normalizes else (first,)
    if not axes:
        raise _MixedError(f"the axes of {node.op_type} are not known")
    return axis in {a - rank if a >= 0 else a for a in axes}


def _ints(node: ir.Node, index: int) -> tuple[int, ...]:
    """Return a constant input as integers; empty if it is missing or computed."""
    tensor = constant_of(input_of(node, index))
    return () if tensor is None else tuple(int(i) for i in np.atleast_1d(tensor.numpy()))
