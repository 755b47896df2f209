"""The station's one entry: a configuration in, a canonical `Graph` without weight data out."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.config import Dtype
from llmc.errors import UnsupportedError
from llmc.graph import dialect
from llmc.graph.model import Graph, Placeholder
from llmc.graph.verify import verify
from llmc.trace.expand import attach_cache, expand_layers
from llmc.trace.export import Exported, export_model
from llmc.trace.simplify import remove_unused, simplify
from llmc.trace.stamp import NotStampableError


def trace_model(config: Any, dtype: Dtype, *, stamp: bool = True) -> Graph:
    """Trace the causal LM of a transformers configuration.

    Args:
        config: transformers configuration of the model.
        dtype: Type of parameters, activations and KV cache.
        stamp: Trace one layer of each kind and copy it for the others. Where layers that look alike
            turn out not to be, the model is traced in full and the graph's notes say why.

    Returns:
        The canonical graph; its weights are named and shaped, and have no data.

    Raises:
        UnsupportedError: The model has no attention with a KV cache that can be captured.
    """
    import torch

    torch_dtype = {Dtype.FLOAT32: torch.float32, Dtype.FLOAT16: torch.float16}[dtype]
    notes: list[str] = []
    if stamp:
        try:
            return _finish(export_model(config, torch_dtype, stamp=True), config, dtype, notes)
        except NotStampableError as reason:
            notes.append(f"traced layer by layer: {reason}")
    try:
        return _finish(export_model(config, torch_dtype, stamp=False), config, dtype, notes)
    except NotStampableError as reason:
        raise UnsupportedError(f"the model's layers cannot be told apart: {reason}") from reason


def _finish(exported: Exported, config: Any, dtype: Dtype, notes: list[str]) -> Graph:
    model = exported.model
    graph = model.graph
    _name_weights(graph, exported.weights)
    simplify(model)
    expand_layers(graph, exported.stack, exported.layer_buffers)
    remove_unused(model)
    onnx_dtype = ir.DataType.FLOAT if dtype is Dtype.FLOAT32 else ir.DataType.FLOAT16
    cache = attach_cache(graph, exported.stack, exported.capture, onnx_dtype)
    for value in list(graph.inputs):
        if value.name == "position_ids" and not value.uses():
            graph.inputs.remove(value)
    _define_dialect(model)
    graph.name = "decoder"
    for reason, count in exported.capture.dense_experts.items():
        notes.append(f"experts traced as dense products in {count} layers, kept in float: {reason}")
    text_config = config.get_text_config()
    result = Graph(
        model=model,
        cache=cache,
        layers=len(exported.stack.names),
        max_length=getattr(text_config, "max_position_embeddings", None),
        aliases=exported.aliases,
        notes=notes,
    )
    verify(result)
    return result


def _name_weights(graph: ir.Graph, weights: frozenset[str]) -> None:
    """Call initializers as the model's parameters are called; drop the exporter's fake data."""
    for old, value in list(graph.initializers.items()):
        del graph.initializers[old]
        name = old.removeprefix("model.")
        value.name = name
        if name in weights:
            tensor = value.const_value
            if tensor is None:
                raise UnsupportedError(f"the exporter left parameter {name} without a type")
            value.const_value = Placeholder(name, tensor.dtype, tuple(tensor.shape.numpy()))
            value.shape = ir.Shape(tensor.shape.numpy())
            value.type = ir.TensorType(tensor.dtype)
        graph.initializers[name] = value


def _define_dialect(model: ir.Model) -> None:
    """Attach the functions of the dialect operators that the graph uses."""
    attention = {len(n.inputs) == 7 for n in _dialect_nodes(model, dialect.CACHED_ATTENTION)}
    if len(attention) != 1:
        raise UnsupportedError("only some of the model's attention layers have sinks")
    functions = [dialect.cached_attention(sinks=attention.pop())]
    experts = {len(n.inputs) == 7 for n in _dialect_nodes(model, dialect.EXPERTS)}
    if len(experts) > 1:
        raise UnsupportedError("only some of the model's experts have biases")
    functions += [dialect.experts(biases=biases) for biases in experts]
    model.functions.clear()
    model.functions.update({function.identifier(): function for function in functions})
    model.graph.opset_imports.clear()
    model.graph.opset_imports.update({"": dialect.OPSET, dialect.DOMAIN: dialect.VERSION})


def _dialect_nodes(model: ir.Model, operator: str) -> list[ir.Node]:
    return [n for n in model.graph if n.domain == dialect.DOMAIN and n.op_type == operator]
