"""Compute the roofline of a decode step: the bytes that must be read, over the memory bandwidth.

A decode step at batch 1 does two operations per weight, so memory bounds it long before arithmetic
does (Williams, Waterman and Patterson 2009).
"""

import math
from pathlib import Path

import numpy as np

from llmc.artifact.latency import Roofline
from llmc.artifact.manifest import MODEL
from llmc.graph.interface import Interface
from llmc.profile import Profile

_LOOKUPS = ("Gather", "GatherBlockQuantized")


def roofline(
    weight_bytes: int, interface: Interface, context: int, profile: Profile, measured_ms: float | None
) -> Roofline:
    """Return the bound at one context length, beside the measured median of a decode step if there is one."""
    kv = kv_bytes(interface, context)
    bound = None
    if profile.bandwidth_gbs is not None:
        bound = (weight_bytes + kv) / (profile.bandwidth_gbs * 1e9) * 1e3
    return Roofline(
        context=context,
        weight_bytes=weight_bytes,
        kv_bytes=kv,
        bandwidth_gbs=profile.bandwidth_gbs,
        bound_ms=bound,
        fraction=None if bound is None or measured_ms is None else bound / measured_ms,
    )


def kv_bytes(interface: Interface, context: int) -> int:
    """Return the bytes of keys, values and states that one step reads after `context` tokens.

    Of keys and values, each layer reads those within its window; states of fixed size are read whole.
    """
    dtypes = {spec.name: np.dtype(spec.dtype) for spec in interface.inputs}
    total = 0
    for slot in interface.cache:
        seen = context if slot.window is None else min(context, slot.window)
        widths = slot.key_width * dtypes[slot.past_key].itemsize
        widths += slot.value_width * dtypes[slot.past_value].itemsize
        total += seen * slot.kv_heads * widths
    return total + sum(math.prod(s.shape) * dtypes[s.past].itemsize for s in interface.states)


def streamed_weight_bytes(folder: Path) -> int:
    """Return the bytes of the initializers of model.onnx that a decode step reads completely.

    A table that is only looked up contributes one row per token and is not counted. Experts count in
    full, so that for a mixture of experts this is an upper bound.
    """
    import onnx_ir as ir

    graph = ir.load(folder / MODEL).graph
    total = 0
    for value in graph.initializers.values():
        tensor = value.const_value
        uses = value.uses()
        looked_up = all(
            use.node.op_type in _LOOKUPS and (use.idx == 0 or use.node.op_type == "GatherBlockQuantized")
            for use in uses
        )
        if tensor is not None and uses and not looked_up:
            total += tensor.nbytes
    return total
