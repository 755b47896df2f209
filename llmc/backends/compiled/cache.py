"""Change the KV cache of a graph to another type than float32, if kernels read it in all layers."""

from collections.abc import Mapping, Set

import onnx_ir as ir

from llmc.config import CacheType
from llmc.errors import KernelError
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.interface import SCALE_BYTES, CacheSlot
from llmc.graph.latent import LATENT_ATTENTION
from llmc.graph.match import dims_of, find_nodes
from llmc.graph.model import Graph

_TYPES = {CacheType.FLOAT16: ir.DataType.FLOAT16, CacheType.INT8: ir.DataType.INT8}
#: Extra elements per row for its scales.
_EXTRA = {CacheType.FLOAT16: 0, CacheType.INT8: SCALE_BYTES}


def narrow_cache(graph: Graph, cache: CacheType, held: Set[ir.Value], reasons: Mapping[ir.Node, str]) -> None:
    """Change the type, and for types with scales the width, of every past and present.

    A runtime allocates one type for all layers, so either all layers change or none. If all layers cache
    latents, which are read in float32, none changes, and the graph has a note.

    Args:
        held: Pasts of the attention that kernels compute.
        reasons: Why nodes stay with ONNX Runtime.

    Raises:
        KernelError: ONNX Runtime's operators read the past or the present of a layer.
    """
    values = {str(v.name): v for v in (*graph.graph.inputs, *graph.graph.outputs)}
    left = [slot for slot in graph.cache if not {values[name] for name in slot.pasts} <= held]
    latent = {v.name for node in find_nodes(graph.graph, LATENT_ATTENTION, DIALECT) for v in node.inputs if v}
    if graph.cache and all(slot.past_key in latent for slot in graph.cache):
        graph.notes.append(
            f"the KV cache stays in float32, not {cache.value}: it has one latent per token, for all heads"
        )
        return
    if left:
        attention = (MICROSOFT, "GroupQueryAttention")
        whys = [why for node, why in reasons.items() if (node.domain, node.op_type) == attention]
        why = whys[0] if whys else "it is in plain operators"
        raise KernelError(
            f"a KV cache in {cache.value} needs compiled attention in every layer, but {len(left)} of "
            f"{len(graph.cache)} stay with ONNX Runtime: {why}",
            hint="use kv_cache: float32",
        )
    _require_kernels(graph, cache, values, reasons)
    slots = []
    for slot in graph.cache:
        for name in slot.names:
            value = values[name]
            *dims, width = dims_of(value)
            value.type = ir.TensorType(_TYPES[cache])
            value.shape = ir.Shape([*dims, int(width) + _EXTRA[cache]])
        slots.append(_widen(slot, _EXTRA[cache]))
    graph.cache = tuple(slots)


def _require_kernels(
    graph: Graph, cache: CacheType, values: Mapping[str, ir.Value], reasons: Mapping[ir.Node, str]
) -> None:
    """Refuse layers that share the cache of another one, but stay with ONNX Runtime."""
    for slot in graph.cache:
        for name in (slot.present_key, slot.present_value):
            outside = [node for node in values[name].consumers() if node in reasons]
            if outside:
                raise KernelError(
                    f"a KV cache in {cache.value} needs compiled attention in every layer, but "
                    f"{len(outside)} that share the cache of layer {slot.layer} stay with ONNX Runtime: "
                    f"{reasons[outside[0]]}",
                    hint="use kv_cache: float32",
                )


def _widen(slot: CacheSlot, extra: int) -> CacheSlot:
    return slot.model_copy(
        update={"key_width": slot.key_width + extra, "value_width": slot.value_width + extra}
    )
