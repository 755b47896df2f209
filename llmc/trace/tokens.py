"""Join the graph of one token to the traced graph; what needs no state is computed for all tokens at once."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import onnx_ir as ir

from llmc.errors import UnsupportedError
from llmc.graph.domains import DIALECT, TRACE
from llmc.graph.edit import set_value
from llmc.graph.interface import StateSlot
from llmc.graph.match import constant_of, dims_of, find_nodes
from llmc.graph.model import LAYER, SCOPES, Placeholder
from llmc.graph.recurrence import RECURRENCE, Token
from llmc.trace.places import BATCH, SEQUENCE
from llmc.trace.simplify import simplify
from llmc.trace.steps import STEP, StepCall, export_token
from llmc.trace.translate import name_weights, translate

#: Operators that treat the elements at each place alike.
_ELEMENTWISE = frozenset(
    {"Abs", "Add", "Cast", "Clip", "Div", "Erf", "Exp", "Gelu", "Identity", "Log", "Max", "Min", "Mul", "Neg"}
    | {"Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh", "Where"}
)
_PREFIX = "mixer."


def attach_tokens(graph: ir.Graph, calls: Sequence[StepCall]) -> dict[int, Token]:
    """Trace the token of every `TokenStep` in a traced graph, and give the node what the token takes.

    Returns:
        The computation of one token, by the number of the node.
    """
    tokens = {}
    for node in find_nodes(graph, STEP, TRACE):
        number = node.attributes["number"].as_int()
        tokens[number] = _Joint(graph, node, calls[number]).join()
    if tokens:
        graph.sort()
    return tokens


def attach_steps(graph: ir.Graph, tokens: Mapping[int, Token]) -> tuple[StateSlot, ...]:
    """Replace every `TokenStep` by the operator of its token, with its states as inputs and outputs.

    Returns:
        The states by layer.
    """
    mask = next(v for v in graph.inputs if v.name == "attention_mask")
    slots = []
    for node in find_nodes(graph, STEP, TRACE):
        layer, number = (node.attributes[name].as_int() for name in ("layer", "number"))
        token = tokens[number]
        own = _slots(layer, token, {str(value.name) for value in graph.inputs})
        pasts, presents = (
            [
                ir.val(name, v.dtype, ["batch", *s.shape])
                for name, v, s in zip(names, token.states, own, strict=True)
            ]
            for names in ([s.past for s in own], [s.present for s in own])
        )
        outputs = [ir.Value(name=o.name, shape=o.shape, type=o.type) for o in node.outputs]
        new = ir.Node(
            DIALECT,
            f"{RECURRENCE}{number}",
            [*node.inputs, *pasts, mask],
            outputs=[*outputs, *presents],
            name=f"layer.{layer}.recurrence.{number}",
            metadata_props={LAYER: str(layer)},
        )
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], list(node.outputs), outputs)
        graph.inputs.extend(pasts)
        graph.outputs.extend(presents)
        slots += own
    return tuple(sorted(slots, key=lambda slot: (slot.layer, slot.past)))


def _slots(layer: int, token: Token, taken: set[str]) -> list[StateSlot]:
    """Return the states of a token, numbered within their kinds and their layer, whose inputs are `taken`."""
    slots = []
    for value, kind in zip(token.states, token.kinds, strict=True):
        suffixes = (f"{layer}.{kind}_state" + (f".{index}" if index else "") for index in count())
        suffix = next(s for s in suffixes if f"past_key_values.{s}" not in taken)
        shape = tuple(int(str(size)) for size in dims_of(value)[1:])
        past, present = f"past_key_values.{suffix}", f"present.{suffix}"
        taken.add(past)
        slots.append(StateSlot(layer=layer, kind=kind, past=past, present=present, shape=shape))
    return slots


@dataclass(frozen=True)
class _Outer:
    """A value of the traced graph with the axis of its tokens; None for a value that has none."""

    value: ir.Value
    axis: int | None


@dataclass
class _Joint:
    """The graph of one token, and the node of the traced graph that it belongs to.

    Args:
        outer: Values of the traced graph, by the values of the token's graph that they are for one token.
        results: Outputs of the node, by the values of the token's graph.
    """

    graph: ir.Graph
    node: ir.Node
    call: StepCall
    outer: dict[ir.Value, _Outer] = field(default_factory=dict)
    results: dict[ir.Value, list[_Outer]] = field(default_factory=dict)

    @property
    def _where(self) -> str:
        mixer = self.call.mixer
        return f"layer {mixer.layer} keeps a state by code of its own ({mixer.kind.__name__})"

    def join(self) -> Token:
        """Move products with weights out of the token's graph, and return what is left of it."""
        body = self._trace()
        arguments = len(self.call.arguments)
        for value, given, (_, shape) in zip(body.inputs, self.node.inputs, self.call.arguments, strict=False):
            if value.uses() and any(isinstance(n, str) and n not in (BATCH, SEQUENCE) for n in shape):
                raise UnsupportedError(f"{self._where}, which reads a tensor of {shape}")
            self.outer[value] = _Outer(_present(given), _axis(shape))
        for weight, given in zip(self._weights(body), self.node.inputs[arguments:], strict=True):
            if weight is not None:
                self.outer[weight] = _Outer(_present(given), None)
        states = list(body.inputs)[arguments:]
        outputs = len(self.call.outputs)
        for value, made, output in zip(body.outputs, self.node.outputs, self.call.outputs, strict=False):
            if made.uses():
                if (axis := _axis(output.shape)) is None:
                    raise UnsupportedError(f"{self._where}, which returns more than a value for each token")
                self.results.setdefault(value, []).append(_Outer(made, axis))
        presents = list(body.outputs)[outputs:]
        body.outputs.clear()
        presents = self._move_first(body, presents)
        self._move_last(body, presents)
        return self._rebuild(body, states, presents)

    def _trace(self) -> ir.Graph:
        """Trace the token, from the tensors of the call and the states to results and states."""
        call = self.call
        states = [f"state_{n}" for n in range(len(call.mixer.places))]
        names = [f"argument_{n}" for n in range(len(call.arguments))]
        results = [f"result_{n}" for n in range(len(call.outputs))]
        dims = [[BATCH if n == BATCH else None for n in shape] for _, shape in call.arguments]
        dims += [[BATCH, *[None] * len(place.shape)] for place in call.mixer.places]
        presents = [f"present_{n}" for n in range(len(states))]
        model = translate(export_token(call), [*names, *states], [*results, *presents], dims)
        name_weights(model.graph, set(call.weights), _PREFIX)
        simplify(model)
        return model.graph

    def _weights(self, body: ir.Graph) -> list[ir.Value | None]:
        return [body.initializers.get(name) for name in self.call.weights]

    def _move_first(self, body: ir.Graph, presents: list[ir.Value]) -> list[ir.Value]:
        """Compute products of the arguments before the node, for all tokens at once.

        Returns:
            The states after the token, of which some may have been moved.
        """
        plain = {value for value, outer in self.outer.items() if outer.axis == 1 and _is_row(value)}
        products: set[ir.Value] = set()
        for node in body:
            if self._treats_tokens_alike(node, plain):
                plain.add(node.outputs[0])
                if node.op_type == "MatMul" or any(value in products for value in node.inputs):
                    products.add(node.outputs[0])
        for node in list(body):
            value = node.outputs[0]
            users = [use.node for use in value.uses()]
            ends = value in self.results or value in presents
            if value not in products or not (ends or any(u.outputs[0] not in products for u in users)):
                continue
            whole = _Outer(self._copy(value, {}, before=True), 1)
            for made in self.results.pop(value, ()):
                ir.convenience.replace_all_uses_with(made.value, whole.value)
            given = ir.Value(name=f"{value.name}_moved", shape=value.shape, type=value.type)
            self.outer[given] = whole
            ir.convenience.replace_all_uses_with(value, given)
            presents = [given if present is value else present for present in presents]
        return presents

    def _move_last(self, body: ir.Graph, presents: Sequence[ir.Value]) -> None:
        """Compute products of what the token's graph returns after the node, for all tokens at once."""
        plain = {
            value
            for value in (*self.outer, *(output for node in body for output in node.outputs))
            if _is_row(value) and self.outer.get(value, _Outer(value, 1)).axis == 1
        }
        last: set[ir.Node] = set()
        for node in reversed(list(body)):
            value = node.outputs[0]
            used = all(use.node in last for use in value.uses()) and (value.uses() or value in self.results)
            if used and value not in presents and self._treats_tokens_alike(node, plain):
                last.add(node)
        moved: dict[ir.Value, ir.Value | None] = {}
        for node in body:
            if node in last and (node.op_type == "MatMul" or any(value in moved for value in node.inputs)):
                moved[node.outputs[0]] = None
        for value in [value for value in self.results if value in moved]:
            whole = self._copy(value, moved, before=False)
            for made in self.results.pop(value):
                ir.convenience.replace_all_uses_with(made.value, whole)

    def _treats_tokens_alike(self, node: ir.Node, plain: set[ir.Value]) -> bool:
        """Return whether `node` maps rows (batch, 1, width) of `plain` to another, each by itself."""
        if len(node.outputs) != 1 or node.domain or not _is_row(node.outputs[0]):
            return False
        if node.op_type == "MatMul":
            first, second = node.inputs
            return first in plain and self._is_fixed(second) and len(_present(second).shape or ()) == 2
        if node.op_type not in _ELEMENTWISE:
            return False
        rows = [value for value in node.inputs if value is not None and value in plain]
        others = [value for value in node.inputs if value is not None and value not in plain]
        return bool(rows) and all(self._is_fixed(v) and len(v.shape or ()) <= 1 for v in others)

    def _is_fixed(self, value: ir.Value | None) -> bool:
        """Return whether a value is a weight or constant, or computed from those."""
        if value is None:
            return False
        if value in self.outer:
            return isinstance(value.const_value, Placeholder)
        if constant_of(value) is not None:
            return True
        node = value.producer()
        return node is not None and all(self._is_fixed(source) for source in node.inputs)

    def _copy(self, value: ir.Value, moved: dict[ir.Value, ir.Value | None], *, before: bool) -> ir.Value:
        """Return a value of the token's graph in the traced graph, for all tokens, beside the node.

        Args:
            moved: Values that are computed after the node, as far as they are; the node returns all others.
        """
        if value in self.outer:
            return self.outer[value].value
        done = moved.get(value)
        if done is not None:
            return done
        tensor = constant_of(value)
        node = value.producer()
        if tensor is None and (node is None or not (before or value in moved or self._is_fixed(value))):
            made = ir.Value(name=f"{self.node.name}/{value.name}", type=value.type)
            made.shape = _for_all_tokens(value)
            self.results.setdefault(value, []).append(_Outer(made, 1))
            moved[value] = made
            return made
        if tensor is not None or node is None:
            made_by = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(_numbers(tensor)))])
        else:
            sources = [None if v is None else self._copy(v, moved, before=before) for v in node.inputs]
            made_by = ir.Node("", node.op_type, sources, list(node.attributes.values()))
        made_by.metadata_props.update(self._scopes(node))
        output = made_by.outputs[0]
        set_value(output, f"{self.node.name}/{value.name}", _for_all_tokens(value), value.dtype)
        self.graph.insert_before(self.node, made_by)  # the graph is sorted afterwards
        if not before:
            moved[value] = output
        return output

    def _scopes(self, node: ir.Node | None) -> dict[str, str]:
        """Return the modules around a node of the token's graph as those of the model."""
        stated = None if node is None else node.metadata_props.get(SCOPES)
        if stated is None:
            return {}
        place = f"model.{self.call.mixer.name}"
        names = [str(name) for name in ast.literal_eval(stated)]
        return {SCOPES: str([place + n.removeprefix("mixer") if n.startswith("mixer") else n for n in names])}

    def _rebuild(self, body: ir.Graph, states: Sequence[ir.Value], presents: Sequence[ir.Value]) -> Token:
        """Give the node the inputs and outputs of what is left in the token's graph."""
        results = [(value, outer) for value, made in self.results.items() for outer in made]
        nodes = _needed(body, [*presents, *(value for value, _ in results)])
        read = {value for node in nodes for value in node.inputs} | set(presents)
        tokens = [(v, o) for v, o in self.outer.items() if o.axis is not None and v in read]
        fixed = [(v, o) for v, o in self.outer.items() if o.axis is None and v in read]
        if not tokens:
            raise UnsupportedError(f"{self._where}, which depends on no token")
        constants = _constants(body, nodes)
        body.remove(list(body))
        for n, (value, _) in enumerate(fixed):
            own = ir.Value(name=f"fixed_{n}", shape=value.shape, type=value.type)
            ir.convenience.replace_all_uses_with(value, own)
            fixed[n] = own, fixed[n][1]
        new = ir.Node(
            TRACE,
            STEP,
            [outer.value for _, outer in (*tokens, *fixed)],
            list(self.node.attributes.values()),
            num_outputs=len(results),
            name=self.node.name,
        )
        for output, (_, outer) in zip(new.outputs, results, strict=True):
            set_value(output, outer.value.name, outer.value.shape, outer.value.dtype)
            outer.value.name = None
            ir.convenience.replace_all_uses_with(outer.value, output)
        self.graph.insert_before(self.node, new)
        self.graph.remove(self.node, safe=True)
        for n, node in enumerate((*constants, *nodes)):
            node.metadata_props.clear()
            node.doc_string = None
            for k, value in enumerate(node.outputs):
                value.name = f"token_{n}_{k}"
                value.metadata_props.clear()
        return Token(
            nodes=(*constants, *nodes),
            tokens=[(value, int(outer.axis or 0)) for value, outer in tokens],
            fixed=[value for value, _ in fixed],
            states=states,
            outputs=[(value, int(outer.axis or 0)) for value, outer in results],
            presents=presents,
            kinds=[place.kind for place in self.call.mixer.places],
        )


def _axis(shape: Sequence[int | str]) -> int | None:
    """Return the axis of tokens; None without one."""
    return list(shape).index(SEQUENCE) if SEQUENCE in shape else None


def _present(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise UnsupportedError("the exporter left an operand of a layer's state out")
    return value


def _is_row(value: ir.Value) -> bool:
    """Return whether a value of the token's graph is (batch, 1, width)."""
    dims = dims_of(value)
    return len(dims) == 3 and dims[0] == BATCH and dims[1] == 1


def _for_all_tokens(value: ir.Value) -> ir.Shape:
    dims = dims_of(value)
    return ir.Shape([dims[0], SEQUENCE, dims[2]] if _is_row(value) else dims)


def _numbers(tensor: ir.TensorProtocol | None) -> np.ndarray:
    if tensor is None:
        raise UnsupportedError("a layer's state depends on a value without a source")
    numbers: np.ndarray = tensor.numpy()
    return numbers


def _needed(body: ir.Graph, values: Sequence[ir.Value]) -> list[ir.Node]:
    """Return the nodes that compute `values`, in order."""
    needed: set[ir.Node] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in needed:
            needed.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    return [node for node in body if node in needed]


def _constants(body: ir.Graph, nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Replace the constants that `nodes` read, which a function cannot hold, by nodes."""
    made = []
    read = {value: None for node in nodes for value in node.inputs if value is not None}
    for value in read:
        if value.is_initializer() and not isinstance(value.const_value, Placeholder):
            tensor = ir.tensor(_numbers(value.const_value))
            node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
            set_value(node.outputs[0], value.name, value.shape, value.dtype)
            ir.convenience.replace_all_uses_with(value, node.outputs[0])
            made.append(node)
    return made
