"""Expand a trace of representative layers to every layer of the model, and remove the markers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from llmc.errors import GraphError
from llmc.graph import dialect, states
from llmc.graph.domains import DIALECT, TRACE
from llmc.graph.edit import add_initializer
from llmc.graph.interface import CacheSlot, StateKind, StateSlot
from llmc.graph.match import find_nodes
from llmc.graph.model import LAYER, Placeholder
from llmc.trace.capture import Capture
from llmc.trace.stamp import BEGIN, END, STUB, LayerStack, NotStampableError
from llmc.trace.stored import attach_stored, slot_of


def expand_layers(graph: ir.Graph, stack: LayerStack, buffers: dict[str, np.ndarray]) -> None:
    """Replace every marker and stub by the nodes of its layer; record a layer's index in each of its nodes.

    Args:
        graph: Traced graph; changed in place.
        stack: The layers and their representatives.
        buffers: Values of every layer's buffers, by qualified name.
    """
    _unfold_runs(graph)
    begins, ends, stubs = (_by_index(graph, kind) for kind in (BEGIN, END, STUB))
    missing = set(range(len(stack.names))) - set(begins) - set(stubs)
    if missing:
        raise NotStampableError(f"layer {min(missing)} is not in the graph")
    bodies = {i: _body(begins[i], ends[i], stack.names[i] + ".") for i in begins}
    for i, nodes in bodies.items():
        for node in nodes:
            node.metadata_props[LAYER] = str(stack.indices[i])
            _prefix_outputs(node, f"layer.{stack.indices[i]}/")
    for i, stub in stubs.items():
        r = stack.representatives[i]
        _stamp(graph, stub, bodies[r], begins[r], ends[r], _Renaming(graph, stack, r, i, buffers))
    for node in [*begins.values(), *ends.values()]:
        for output, source in zip(node.outputs, node.inputs, strict=True):
            if source is None:
                raise NotStampableError("a layer marker has an empty input")
            ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _unfold_runs(graph: ir.Graph) -> None:
    """Replace the stub of a run of layers by one `LayerStub` per layer."""
    for run in find_nodes(graph, STUB, TRACE):
        indices, operands, counts = (
            list(run.attributes[key].as_ints()) for key in ("indices", "operands", "counts")
        )
        tensors = list(run.inputs)
        result: ir.Value | None = None
        for n, (index, count) in enumerate(zip(indices, counts, strict=True)):
            inputs = [result if position < 0 else tensors[position] for position in operands[:count]]
            del operands[:count]
            outputs = len(run.outputs) if n == len(indices) - 1 else 1
            attributes = [ir.AttrInt64("index", index)]
            stub = ir.Node(TRACE, STUB, inputs, attributes, num_outputs=outputs, name=f"stub.{index}")
            graph.insert_before(run, stub)
            for output, like in zip(stub.outputs, run.outputs, strict=False):
                output.name = f"stub.{index}/{like.name}"
                output.shape, output.type = like.shape, like.type
            result = stub.outputs[0]
        ir.convenience.replace_all_uses_with(run.outputs, stub.outputs, replace_graph_outputs=True)
        graph.remove(run, safe=True)


def attach_cache(
    graph: ir.Graph, stack: LayerStack, capture: Capture, dtype: ir.DataType
) -> tuple[CacheSlot, ...]:
    """Give every `CachedAttention` its mask, past and present as graph inputs and outputs.

    What layers store while they compute attention themselves is appended to inputs (`llmc.trace.stored`).

    Returns:
        The cache slots by layer.
    """
    mask = next(v for v in graph.inputs if v.name == "attention_mask")
    layers = len(stack.names) or 1 + max((*capture.stored, *capture.attentions), default=0)
    slots: dict[int, CacheSlot] = {}
    pasts: dict[int, tuple[ir.Value, ir.Value]] = {}
    slots.update({slot.layer: slot for slot in attach_stored(graph, layers)})
    for node in find_nodes(graph, dialect.CACHED_ATTENTION, DIALECT):
        layer = node.attributes["layer"].as_int()
        owner = node.attributes["owner"].as_int()
        attention = capture.attentions[_traced_index(stack, layer)]
        if owner == layer:
            widths = attention.key_width, attention.value_width
            window = attention.visible.furthest or None
            slots[layer] = slot = slot_of(layer, attention.kv_heads, *widths, window)
            pasts[layer] = (
                _cache_value(slot.past_key, slot, slot.key_width, "past", dtype),
                _cache_value(slot.past_value, slot, slot.value_width, "past", dtype),
            )
            graph.inputs.extend(pasts[layer])
        slot = slots[owner]
        present = (
            _cache_value(slot.present_key, slot, slot.key_width, "total", dtype),
            _cache_value(slot.present_value, slot, slot.value_width, "total", dtype),
        )
        if owner != layer:
            for value in present:
                value.name = f"{value.name}.shared.{layer}"
        query, keys, values, *sinks = node.inputs
        attributes = [a for n, a in node.attributes.items() if n not in ("layer", "owner")]
        visible = attention.visible
        attributes += [ir.AttrInt64("window", visible.window), ir.AttrInt64("chunk", visible.chunk)]
        output = ir.Value(name=node.outputs[0].name, shape=node.outputs[0].shape, type=node.outputs[0].type)
        new = ir.Node(
            DIALECT,
            dialect.CACHED_ATTENTION,
            [query, keys, values, *pasts[owner], mask, *sinks],
            attributes,
            outputs=[output, *present],
            name=f"layer.{layer}/attention",
            metadata_props={LAYER: str(layer)},
        )
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], [node.outputs[0]], [output])
        if owner == layer:
            graph.outputs.extend(present)
    return tuple(slots[i] for i in sorted(slots))


def attach_states(graph: ir.Graph) -> tuple[StateSlot, ...]:
    """Give every convolution and recurrence its mask, and its state as an input and output of the graph.

    Returns:
        The states by layer, those of convolutions first.
    """
    mask = next(v for v in graph.inputs if v.name == "attention_mask")
    slots = [_attach_state(graph, n, "conv", mask) for n in find_nodes(graph, states.CAUSAL_CONV, TRACE)]
    slots += [
        _attach_state(graph, n, "recurrent", mask) for n in find_nodes(graph, states.LINEAR_ATTENTION, TRACE)
    ]
    return tuple(sorted(slots, key=lambda slot: (slot.layer, slot.kind, slot.past)))


def _attach_state(graph: ir.Graph, node: ir.Node, kind: StateKind, mask: ir.Value) -> StateSlot:
    attributes = dict(node.attributes)
    layer, index = (attributes.pop(name).as_int() for name in ("layer", "index"))
    suffix = f"{layer}.{kind}_state" + (f".{index}" if index else "")
    output, state = node.outputs
    if state.shape is None or state.dtype is None or output.shape is None:
        raise GraphError(f"the state of layer {layer} has no shape or no type")
    sizes = tuple(int(str(d)) for d in list(state.shape)[1:])
    slot = StateSlot(
        layer=layer,
        kind=kind,
        past=f"past_key_values.{suffix}",
        present=f"present.{suffix}",
        shape=sizes,
    )
    past, present = (ir.val(name, state.dtype, ["batch", *sizes]) for name in (slot.past, slot.present))
    inputs = list(node.inputs)
    if kind == "conv":
        attributes["channels"] = ir.AttrInt64("channels", sizes[0])
        inputs = [*inputs[:2], *(inputs[2:] or [None]), past, mask]
    else:
        inputs = [*inputs[:3], past, inputs[3], *(inputs[4:] or [None]), mask]
    result = ir.Value(name=output.name, shape=output.shape, type=output.type)
    new = ir.Node(
        DIALECT,
        node.op_type,
        inputs,
        list(attributes.values()),
        outputs=[result, present],
        name=f"layer.{suffix}".replace("_state", ""),
        metadata_props={LAYER: str(layer)},
    )
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], [output], [result])
    graph.inputs.append(past)
    graph.outputs.append(present)
    return slot


def _traced_index(stack: LayerStack, layer: int) -> int:
    """Return the index of the layer that was traced to represent `layer`."""
    if layer not in stack.indices:
        return layer
    return stack.indices[stack.representatives[stack.indices.index(layer)]]


def _cache_value(name: str, slot: CacheSlot, width: int, length: str, dtype: ir.DataType) -> ir.Value:
    return ir.val(name, dtype, ["batch", slot.kv_heads, length, width])


def _by_index(graph: ir.Graph, kind: str) -> dict[int, ir.Node]:
    return {n.attributes["index"].as_int(): n for n in find_nodes(graph, kind, TRACE)}


def _body(begin: ir.Node, end: ir.Node, prefix: str) -> list[ir.Node]:
    """List the nodes between the markers that depend on the layer's input or weights, in graph order."""
    inside: dict[ir.Node, bool] = {begin: True}

    def owned(value: ir.Value | None) -> bool:
        if value is None:
            return False
        node = value.producer()
        if node is None:
            return bool(value.name and value.name.startswith(prefix))
        return inside[node]

    stack = [v.producer() for v in end.inputs if v is not None]
    while stack:
        node = stack[-1]
        if node is None or node in inside:
            stack.pop()
            continue
        waiting = [
            p for v in node.inputs if v is not None and (p := v.producer()) is not None and p not in inside
        ]
        if waiting:
            stack.extend(waiting)
            continue
        inside[node] = any(owned(v) for v in node.inputs)
        stack.pop()
    members = {n for n, is_inside in inside.items() if is_inside and n is not begin}
    graph = begin.graph
    if graph is None:
        raise NotStampableError("a layer marker is not in a graph")
    return [n for n in graph if n in members]


def _prefix_outputs(node: ir.Node, prefix: str) -> None:
    for output in node.outputs:
        output.name = prefix + (output.name or "")
    node.name = prefix + (node.name or "")


class _Renaming:
    """The renaming of a representative's names to a stamped layer's names."""

    def __init__(
        self, graph: ir.Graph, stack: LayerStack, old: int, new: int, buffers: dict[str, np.ndarray]
    ) -> None:
        self.graph = graph
        self.buffers = buffers
        self.module = (stack.names[old] + ".", stack.names[new] + ".")
        self.values = (f"layer.{stack.indices[old]}/", f"layer.{stack.indices[new]}/")
        self.index = (stack.indices[old], stack.indices[new])

    def value_name(self, name: str) -> str:
        return self.values[1] + name.removeprefix(self.values[0])

    def initializer(self, value: ir.Value) -> ir.Value:
        """Return the stamped layer's own weight or buffer; shared constants stay the same."""
        old, new = self.module
        if not value.name or not value.name.startswith(old):
            return value
        name = new + value.name.removeprefix(old)
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = value.const_value
        if tensor is None:
            raise NotStampableError(f"initializer {value.name} has no data")
        data: ir.TensorProtocol
        if isinstance(tensor, Placeholder):
            data = Placeholder(name, tensor.dtype, tuple(tensor.shape.numpy()))
        elif name in self.buffers:
            data = ir.tensor(self.buffers[name], dtype=tensor.dtype, name=name)
        else:
            raise NotStampableError(f"layer has no buffer {name}")
        return add_initializer(self.graph, data)


def _stamp(
    graph: ir.Graph, stub: ir.Node, body: list[ir.Node], begin: ir.Node, end: ir.Node, renaming: _Renaming
) -> None:
    """Replace the stub by a copy of `body`."""
    mapped: dict[ir.Value, ir.Value | None] = dict(zip(begin.outputs, stub.inputs, strict=True))

    def resolve(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value in mapped:
            return mapped[value]
        return renaming.initializer(value) if value.is_initializer() else value

    old_index, new_index = renaming.index
    for node in body:
        outputs = [
            ir.Value(name=renaming.value_name(o.name or ""), shape=o.shape, type=o.type) for o in node.outputs
        ]
        attributes = list(_reindexed(node.attributes.values(), node.domain, old_index, new_index))
        copy = ir.Node(
            node.domain,
            node.op_type,
            [resolve(v) for v in node.inputs],
            attributes,
            outputs=outputs,
            version=node.version,
            name=renaming.value_name(node.name or ""),
            metadata_props={LAYER: str(new_index)},
        )
        graph.insert_before(stub, copy)
        mapped.update(zip(node.outputs, outputs, strict=True))
    for output, source in zip(stub.outputs, end.inputs, strict=True):
        replacement = resolve(source)
        if replacement is None:
            raise NotStampableError("a layer returns an empty value")
        ir.convenience.replace_all_uses_with(output, replacement, replace_graph_outputs=True)
    graph.remove(stub, safe=True)


def _reindexed(attributes: Iterable[ir.Attr], domain: str, old: int, new: int) -> Iterable[ir.Attr]:
    for attribute in attributes:
        if domain in (DIALECT, TRACE) and attribute.name in ("layer", "owner"):
            index = attribute.as_int()
            if attribute.name == "layer" and index != old:
                raise NotStampableError(f"layer {old} computes attention of layer {index}")
            yield ir.AttrInt64(attribute.name, new if index == old else index)
        else:
            yield attribute
