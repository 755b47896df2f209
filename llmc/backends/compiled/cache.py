"""Change the KV cache of a graph to another type than float32, if kernels read it in all layers."""

from collections.abc import Mapping

import onnx_ir as ir

from llmc.config import CacheType
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.interface import SCALE_BYTES, CacheSlot
from llmc.graph.latent import LATENT_ATTENTION
from llmc.graph.match import dims_of
from llmc.graph.model import Graph

_TYPES = {CacheType.FLOAT16: ir.DataType.FLOAT16, CacheType.INT8: ir.DataType.INT8}
#: Extra elements per row for its scales.
_EXTRA = {CacheType.FLOAT16: 0, CacheType.INT8: SCALE_BYTES}
_LATENT = "it has one latent per token"


def choose_type(graph: Graph, wanted: CacheType, reasons: Mapping[ir.Node, str]) -> CacheType:
    """Return `wanted` if kernels read the keys and values of every layer, else float32.

    A runtime allocates one type for all layers, and ONNX Runtime's operators read float32. If the type is
    not the wanted one, the graph gets a note.

    Args:
        reasons: Why nodes stay with ONNX Runtime.
    """
    if wanted is CacheType.FLOAT32:
        return wanted
    values = {str(v.name): v for v in (*graph.graph.inputs, *graph.graph.outputs)}
    outside = {}
    for slot in graph.cache:
        readers = (node for name in slot.names for node in values[name].consumers() if node in reasons)
        if (reader := next(readers, None)) is not None:
            outside[slot.layer] = _why(reader, reasons[reader])
    if not outside:
        return wanted
    if len(outside) == len(graph.cache) and set(outside.values()) == {_LATENT}:
        graph.notes.append(f"the KV cache stays in float32, not {wanted.value}: {_LATENT}, for all heads")
    else:
        layer, why = next(iter(outside.items()))
        graph.notes.append(
            f"the KV cache stays in float32, not {wanted.value}: ONNX Runtime reads the cache of "
            f"{len(outside)} of {len(graph.cache)} layers; in layer {layer}, {why}"
        )
    return CacheType.FLOAT32


def _why(reader: ir.Node, reason: str) -> str:
    """Describe why ONNX Runtime reads the cache of a layer."""
    if (reader.domain, reader.op_type) == (DIALECT, LATENT_ATTENTION):
        return _LATENT
    attention = (reader.domain, reader.op_type) == (MICROSOFT, "GroupQueryAttention")
    return f"attention stays outside of kernels: {reason}" if attention else "attention is in plain operators"


def narrow_cache(graph: Graph, cache: CacheType) -> None:
    """Change the type, and for types with scales the width, of every past and present."""
    values = {str(v.name): v for v in (*graph.graph.inputs, *graph.graph.outputs)}
    slots = []
    for slot in graph.cache:
        for name in slot.names:
            value = values[name]
            *dims, width = dims_of(value)
            value.type = ir.TensorType(_TYPES[cache])
            value.shape = ir.Shape([*dims, int(width) + _EXTRA[cache]])
        slots.append(_widen(slot, _EXTRA[cache]))
    graph.cache = tuple(slots)


def _widen(slot: CacheSlot, extra: int) -> CacheSlot:
    return slot.model_copy(
        update={"key_width": slot.key_width + extra, "value_width": slot.value_width + extra}
    )
