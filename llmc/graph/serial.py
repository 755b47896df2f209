"""Serialize an unbound graph for the trace cache, and load it; weights are named but not stored."""

import json
from typing import Any

from llmc.errors import GraphError
from llmc.graph.interface import CacheSlot, StateSlot
from llmc.graph.model import Graph, Placeholder

_KEY = "llmc.graph"


def dump_graph(graph: Graph) -> bytes:
    """Serialize a graph whose weights have no data yet; weights become inputs of the ONNX model.

    Raises:
        GraphError: A weight already has data.
    """
    import onnx_ir.serde

    model = graph.model.clone()
    weights = []
    for name, value in list(model.graph.initializers.items()):
        if isinstance(value.const_value, Placeholder):
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)
            weights.append(name)
        elif value.const_value is not None and value.const_value.nbytes > 1 << 24:
            raise GraphError(f"initializer {name} has {value.const_value.nbytes:,} bytes of data already")
    model.metadata_props[_KEY] = json.dumps(
        {
            "weights": weights,
            "cache": [slot.model_dump() for slot in graph.cache],
            "states": [slot.model_dump() for slot in graph.states],
            "layers": graph.layers,
            "logits": graph.logits,
            "padding": graph.padding,
            "max_length": graph.max_length,
            "restart": graph.restart,
            "aliases": {k: list(v) for k, v in graph.aliases.items()},
            "notes": graph.notes,
        },
        sort_keys=True,
    )
    data: bytes = onnx_ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return data


def load_graph(data: bytes) -> Graph:
    """Load a graph from `data` written by `dump_graph`."""
    import onnx
    import onnx_ir.serde

    model = onnx_ir.serde.deserialize_model(onnx.ModelProto.FromString(data))
    facts: dict[str, Any] = json.loads(model.metadata_props.pop(_KEY))
    inputs = {v.name: v for v in model.graph.inputs}
    for name in facts["weights"]:
        value = inputs[name]
        model.graph.inputs.remove(value)
        if value.dtype is None or value.shape is None:
            raise GraphError(f"cached weight {name} has no type or shape")
        value.const_value = Placeholder(name, value.dtype, tuple(value.shape.numpy()))
        model.graph.register_initializer(value)
    return Graph(
        model=model,
        cache=tuple(CacheSlot(**slot) for slot in facts["cache"]),
        states=tuple(StateSlot(**slot) for slot in facts["states"]),
        layers=facts["layers"],
        logits=facts["logits"],
        padding=facts["padding"],
        max_length=facts["max_length"],
        restart=facts["restart"],
        aliases={k: tuple(v) for k, v in facts["aliases"].items()},
        notes=facts["notes"],
    )
