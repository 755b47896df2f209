"""Turn a configuration into a canonical `Graph` without weight data: the only entry to tracing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.config import Dtype
from llmc.errors import UnsupportedError, number_ranges
from llmc.graph import dialect, states
from llmc.graph.domains import DIALECT, OPSET
from llmc.graph.edit import name_constant, require_domain
from llmc.graph.match import dims_of, find_nodes
from llmc.graph.model import LAYER, SCOPES, Graph, Placeholder, layer_of
from llmc.graph.recurrence import Token, recurrence
from llmc.graph.verify import verify_graph
from llmc.trace.capture import UnknownStateError
from llmc.trace.carried import carry_states
from llmc.trace.expand import attach_cache, attach_states, expand_layers
from llmc.trace.export import Exported, export_model, quiet
from llmc.trace.idle import idle_note
from llmc.trace.mixers import find_mixers
from llmc.trace.places import Mixer
from llmc.trace.positions import padding_side, stated_positions, table_positions
from llmc.trace.simplify import remove_unused, simplify
from llmc.trace.stamp import NotStampableError, RepeatedLayerError
from llmc.trace.tokens import attach_steps
from llmc.trace.translate import name_weights

_ELEMENT_TYPES = {
    Dtype.FLOAT32: ir.DataType.FLOAT,
    Dtype.FLOAT16: ir.DataType.FLOAT16,
    Dtype.BFLOAT16: ir.DataType.BFLOAT16,
}

#: Operators between a stored matrix and its product.
_VIEWS = frozenset({"Transpose", "Cast"})


def trace_model(config: Any, dtype: Dtype, *, stamp: bool = True) -> Graph:
    """Trace the causal LM of a transformers configuration.

    Args:
        config: transformers configuration of the model.
        dtype: Type of parameters, activations and KV cache.
        stamp: Whether to trace one layer of each kind and copy it for the others. If layers that look alike
            behave differently, the model is traced in full and the graph's notes give the reason.

    Returns:
        The canonical graph; its weights have names and shapes but no data.

    Raises:
        UnsupportedError: The model has no attention with a KV cache that can be captured.
    """
    import torch

    try:
        return _trace_either(config, dtype, [], (), stamp=stamp)
    except UnknownStateError as error:
        try:
            with quiet():
                mixers = find_mixers(config, getattr(torch, dtype.value))
        except UnsupportedError as why:
            raise UnsupportedError(f"{error.fact}; {why.fact}", hint=error.hint) from why
        if not mixers:
            raise
    layers = number_ranges(sorted({mixer.layer for mixer in mixers}))
    note = f"layers {layers} keep a state by code of their own, which is computed token by token"
    return _trace_either(config, dtype, [note], mixers, stamp=stamp)


def _trace_either(
    config: Any, dtype: Dtype, notes: list[str], mixers: Sequence[Mixer], *, stamp: bool
) -> Graph:
    """Trace a model with attention as one operator, or as the model computes it if that is not possible."""
    try:
        return _trace(config, dtype, list(notes), mixers, stamp=stamp, captured=True)
    except UnknownStateError:
        raise
    except UnsupportedError as error:
        reason = error
    notes = [*notes, f"attention is traced as the model computes it: {reason.fact}"]
    try:
        return _trace(config, dtype, notes, mixers, stamp=stamp, captured=False)
    except UnknownStateError:
        raise
    except UnsupportedError as error:
        if error.fact == reason.fact:
            raise
        raise UnsupportedError(
            f"{error.fact}; its attention is not captured either: {reason.fact}", hint=error.hint
        ) from error


def _trace(
    config: Any, dtype: Dtype, notes: list[str], mixers: Sequence[Mixer], *, stamp: bool, captured: bool
) -> Graph:
    import torch

    torch_dtype: torch.dtype = getattr(torch, dtype.value)

    def export(*, stamp: bool, mark: bool = True) -> Graph:
        exported = export_model(config, torch_dtype, stamp=stamp, captured=captured, mark=mark, mixers=mixers)
        return _finish(exported, config, dtype, notes)

    try:
        if stamp:
            try:
                return export(stamp=True)
            except NotStampableError as error:
                notes.append(f"traced layer by layer: {error}")
                if isinstance(error, RepeatedLayerError):
                    raise
        return export(stamp=False)
    except RepeatedLayerError:
        return export(stamp=False, mark=False)
    except NotStampableError as error:
        raise UnsupportedError(f"the model's layers cannot be distinguished: {error}") from error


def _finish(exported: Exported, config: Any, dtype: Dtype, notes: list[str]) -> Graph:
    model = exported.model
    graph = model.graph
    name_weights(graph, exported.weights, "model.")
    simplify(model)
    expand_layers(graph, exported.stack, exported.layer_buffers)
    remove_unused(model)
    onnx_dtype = _ELEMENT_TYPES[dtype]
    cache = attach_cache(graph, exported.stack, exported.capture, onnx_dtype)
    kept = carry_states(graph, cache, attach_states(graph) + attach_steps(graph, exported.tokens))
    if not exported.capture.stored:
        _refuse_uncaptured(graph)
    for value in list(graph.inputs):
        if value.name == "position_ids" and not value.uses():
            graph.inputs.remove(value)
    rules = (rule.local_size for rule in exported.capture.masks)
    padding = padding_side(graph, windowed=bool(exported.capture.stored) and any(rules))
    if padding != "any":
        why = {"left": "a window counts slots", "none": "positions are slots of the cache"}[padding]
        side = {"left": "on the left only", "none": "nowhere: its rows must have equal length"}[padding]
        notes.append(f"a batch is padded {side}, since {why}")
    if (idle := idle_note(config, exported.stack.names)) is not None:
        notes.append(idle)
    _define_dialect(model, exported.tokens)
    _drop_traces(model)
    graph.name = "decoder"
    if exported.capture.dense_experts:
        layers, why = _dense_layers(graph), ", or ".join(exported.capture.dense_experts)
        where = f" in layers {number_ranges(layers)}" if layers else ""
        notes.append(f"experts traced as dense products{where}, kept in float: {why}")
    if exported.held is not None:
        notes.append(
            f"the rotary embedding scales its frequencies with the length beyond {exported.held} tokens "
            "(dynamic NTK); the context ends there"
        )
    lengths = (stated_positions(config), table_positions(graph), exported.held)
    limits = [n for n in lengths if n is not None]
    result = Graph(
        model=model,
        cache=cache,
        layers=len(exported.stack.names) or len(cache),
        states=kept,
        padding=padding,
        max_length=min(limits, default=None),
        restart=exported.restart,
        aliases=exported.aliases,
        notes=notes,
    )
    verify_graph(result)
    return result


def _refuse_uncaptured(graph: ir.Graph) -> None:
    """Refuse layers that mix tokens although nothing was captured in them: a step would not see earlier ones.

    Raises:
        UnsupportedError: A layer does; the message gives their numbers.
    """
    captured = {layer_of(n) for n in graph if n.domain == DIALECT and n.op_type != dialect.EXPERTS}
    mixing = {layer_of(n) for n in graph if _mixes_tokens(n)} - captured - {None}
    if mixing:
        raise UnsupportedError(
            f"layers {number_ranges(sorted(n for n in mixing if n is not None))} mix tokens by code of their "
            "own, which keeps nothing between steps",
            hint="known are attention through transformers' interface, and the kernels that it wraps",
        )


def _mixes_tokens(node: ir.Node) -> bool:
    """Return whether a node sums over a dimension of dynamic size, as attention does over tokens."""
    if node.op_type == "MatMul" and len(dims := dims_of(node.inputs[1])) > 1:
        return not isinstance(dims[-2], int)
    return node.op_type in ("CumSum", "Conv", "Scan", "Loop")


def _dense_layers(graph: ir.Graph) -> list[int]:
    """Return the layers whose stacked matrices are multiplied as a whole, ascending."""
    layers = set()
    for node in find_nodes(graph, "MatMul"):
        source = node.inputs[1]
        while source is not None and (step := source.producer()) is not None and step.op_type in _VIEWS:
            source = step.inputs[0]
        weight = None if source is None else source.const_value
        layer = layer_of(node)
        if isinstance(weight, Placeholder) and len(weight.shape) == 3 and layer is not None:
            layers.add(layer)
    return sorted(layers)


def _drop_traces(model: ir.Model) -> None:
    """Drop what the exporter records of the machine that traces, such as the paths in its stack traces."""
    for node in model.graph.all_nodes():
        kept = {key: node.metadata_props[key] for key in (LAYER, SCOPES) if key in node.metadata_props}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _define_dialect(model: ir.Model, tokens: Mapping[int, Token]) -> None:
    """Attach the functions of the dialect operators that the graph uses."""
    functions = []
    attention = find_nodes(model.graph, dialect.CACHED_ATTENTION, DIALECT)
    if attention:
        sinks = any(len(n.inputs) == 7 for n in attention)
        if sinks:
            _give_sinks(model.graph, [n for n in attention if len(n.inputs) == 6])
        functions.append(dialect.cached_attention(sinks=sinks))
    experts = {len(n.inputs) == 7 for n in find_nodes(model.graph, dialect.EXPERTS, DIALECT)}
    if len(experts) > 1:
        raise UnsupportedError("only some of the model's experts have biases")
    functions += [dialect.experts(biases=biases) for biases in experts]
    if find_nodes(model.graph, states.CAUSAL_CONV, DIALECT):
        functions.append(states.causal_conv())
    rules = {
        n.attributes["delta"].as_int() for n in find_nodes(model.graph, states.LINEAR_ATTENTION, DIALECT)
    }
    if len(rules) > 1:
        raise UnsupportedError("only some of the model's recurrences follow the delta rule")
    functions += [states.linear_attention(delta=bool(rule)) for rule in rules]
    functions += [recurrence(number, token) for number, token in tokens.items()]
    model.functions.clear()
    model.functions.update({function.identifier(): function for function in functions})
    model.graph.opset_imports.clear()
    model.graph.opset_imports[""] = OPSET
    if functions:
        require_domain(model.graph, DIALECT)


def _give_sinks(graph: ir.Graph, attention: list[ir.Node]) -> None:
    """Add sinks without effect to layers that have none in a model where others have sinks."""
    for node in attention:
        heads = node.attributes["num_heads"].as_int()
        dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
        kind = (dtype or ir.DataType.FLOAT).numpy()
        name = f"no_sinks_{heads}"
        node.resize_inputs(7)
        node.replace_input_with(6, name_constant(graph, name, np.full(heads, np.finfo(kind).min, kind)))
