"""Carry the states of a layer in the two tensors that onnxruntime-genai serves for it.

The runtime feeds one convolution's state and one recurrence's state per layer, of the same shapes in all
layers. States that are not like that are laid end to end in a row of numbers, which is cut in two halves; if
every layer with states has both kinds, the states of each kind have a row of their own. A row is as long in
each layer as in the one with the most numbers; what is left of it goes unchanged from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.errors import UnsupportedError
from llmc.graph.edit import Attribute, add_constant, set_value
from llmc.graph.interface import CacheSlot, StateKind, StateSlot
from llmc.graph.model import LAYER
from llmc.graph.serving import layers_by_kind, states_obstacle

_KINDS: tuple[StateKind, StateKind] = ("conv", "recurrent")


def carry_states(
    graph: ir.Graph, cache: Sequence[CacheSlot], states: tuple[StateSlot, ...]
) -> tuple[StateSlot, ...]:
    """Replace states that the runtime does not serve as they are by two for each layer.

    Returns:
        The states that are inputs and outputs of the graph afterwards, by layer.
    """
    if states_obstacle(cache, states) is None:
        return states
    convolutions, recurrences = layers_by_kind(states)
    groups = [(kind,) for kind in _KINDS] if convolutions == recurrences else [_KINDS]
    carried: list[StateSlot] = []
    for kinds in groups:
        of_kinds = [state for state in states if state.kind in kinds]
        rows: dict[int, list[StateSlot]] = {}
        for state in of_kinds:
            rows.setdefault(state.layer, []).append(state)
        if len(kinds) == 1 and len(rows) == len(of_kinds) and len({s.shape for s in of_kinds}) == 1:
            carried += of_kinds
            continue
        length = -(-max(sum(map(_numbers, row)) for row in rows.values()) // len(kinds))
        for layer, row in rows.items():
            slots = [_slot(layer, kind, length) for kind in kinds]
            _carry(_Layer(graph, layer, _dtype(graph, layer, row)), row, slots)
            carried += slots
    return tuple(sorted(carried, key=lambda slot: (slot.layer, slot.kind)))


def _slot(layer: int, kind: StateKind, length: int) -> StateSlot:
    """Return a state that carries `length` numbers, of the rank that the runtime expects."""
    return StateSlot(
        layer=layer,
        kind=kind,
        past=f"past_key_values.{layer}.{kind}_state",
        present=f"present.{layer}.{kind}_state",
        shape=(1, length) if kind == "conv" else (1, 1, length),
    )


def _numbers(state: StateSlot) -> int:
    return math.prod(state.shape)


def _dtype(graph: ir.Graph, layer: int, states: Sequence[StateSlot]) -> ir.DataType:
    names = {state.past for state in states}
    dtypes = {value.dtype for value in graph.inputs if value.name in names}
    dtype = dtypes.pop()
    if dtypes or dtype is None:
        raise UnsupportedError(
            f"layer {layer} keeps states of different types, which no tensor carries together",
            hint="choose a target whose activations are float32",
        )
    return dtype


def _carry(layer: _Layer, states: Sequence[StateSlot], slots: Sequence[StateSlot]) -> None:
    """Read the states of one layer from the past of `slots`, and write them to its present."""
    graph = layer.graph
    inputs, outputs = ({str(v.name): v for v in values} for values in (graph.inputs, graph.outputs))
    pasts, presents = [inputs[s.past] for s in states], [outputs[s.present] for s in states]
    for value in (*pasts, *presents):
        value.name = f"{value.name}.carried"
    for present in presents:
        graph.outputs.remove(present)
    carriers = [ir.val(s.past, layer.dtype, ["batch", *s.shape]) for s in slots]
    graph.inputs.extend(carriers)
    sizes = [_numbers(s) for s in states]
    if rest := sum(map(_numbers, slots)) - sum(sizes):
        sizes.append(rest)

    first = next(node for node in graph if any(value in pasts for value in node.inputs))
    parts = layer.cut(layer.row(carriers, "before", first), sizes, "before", first)
    for past, part, state in zip(pasts, parts, states, strict=False):
        shaped = layer.shape(part, state.shape, f"{past.name}.shaped", first)
        ir.convenience.replace_all_uses_with(past, shaped)
        graph.inputs.remove(past)
    row = layer.row([*presents, *parts[len(states) :]], "after")
    halves = layer.cut(row, [_numbers(s) for s in slots], "after")
    for half, slot in zip(halves, slots, strict=True):
        present = layer.shape(half, slot.shape, slot.present)
        present.name = slot.present
        graph.outputs.append(present)


@dataclass(frozen=True)
class _Layer:
    """Emits the nodes of one layer, each before `anchor`, or as the last one if that is None."""

    graph: ir.Graph
    number: int
    dtype: ir.DataType

    def row(self, values: Sequence[ir.Value], name: str, anchor: ir.Node | None = None) -> ir.Value:
        """Return the numbers of `values`, each (batch, …), end to end in (batch, numbers)."""
        flat = [
            v if v.shape is not None and len(v.shape) == 2 else self.shape(v, (-1,), f"{v.name}.row", anchor)
            for v in values
        ]
        if len(flat) == 1:
            return flat[0]
        return self._emit("Concat", flat, [f"{name}.row"], [["batch", "row"]], anchor, {"axis": 1})[0]

    def cut(
        self, row: ir.Value, sizes: Sequence[int], name: str, anchor: ir.Node | None = None
    ) -> list[ir.Value]:
        """Return consecutive parts (batch, size) of a row."""
        if len(sizes) == 1:
            return [row]
        lengths = add_constant(self.graph, np.array(sizes, np.int64), "sizes")
        names = [f"{name}.part.{n}" for n in range(len(sizes))]
        return self._emit(
            "Split", [row, lengths], names, [["batch", size] for size in sizes], anchor, {"axis": 1}
        )

    def shape(
        self, value: ir.Value, sizes: Sequence[int], name: str, anchor: ir.Node | None = None
    ) -> ir.Value:
        """Return `value` as (batch, *sizes)."""
        shape = add_constant(self.graph, np.array([0, *sizes], np.int64), "shape")
        dims = ["batch", *("row" if size < 0 else size for size in sizes)]
        return self._emit("Reshape", [value, shape], [name], [dims], anchor)[0]

    def _emit(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        names: Sequence[str],
        shapes: Sequence[Sequence[int | str]],
        anchor: ir.Node | None,
        attributes: dict[str, Attribute] | None = None,
    ) -> list[ir.Value]:
        stem = f"layer.{self.number}/states/"
        node = ir.Node(
            "",
            op,
            inputs,
            ir.convenience.convert_attributes(attributes or {}),
            num_outputs=len(names),
            name=f"{stem}{names[0]}/{op}",
            metadata_props={LAYER: str(self.number)},
        )
        for output, name, shape in zip(node.outputs, names, shapes, strict=True):
            set_value(output, stem + name, shape, self.dtype)
        if anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(anchor, node)
        return list(node.outputs)
