"""Where the context of an artifact ends, because its runtime cannot follow the original any further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmc.config import Target
from llmc.graph.switches import RESTARTING_TYPES, rope_switches

if TYPE_CHECKING:
    from llmc.graph.model import Graph


def limit_context(graph: Graph, config: Any, target: Target) -> str | None:
    """End the context of `graph` before the first switch that the target's runtime cannot follow.

    Args:
        graph: As traced; changed in place.
        config: The model's transformers configuration.

    Returns:
        What the user has to know of it; None if the context stays as it is.
    """
    length = graph.max_length
    capacity = length if target.engine is None else target.engine.kv_capacity
    switches = [at for at in rope_switches(config) if capacity is None or at < capacity]
    if graph.restart not in switches:
        graph.restart = None
    if not switches:
        return None
    reason = _obstacle(graph.restart, target)
    if reason is None:
        return None
    graph.max_length, graph.restart = switches[0], None
    return (
        f"the context ends at {switches[0]} tokens, of {length or 'any number'}, before the rotary embedding "
        f"switches to its long factors: {reason}"
    )


def _obstacle(restart: int | None, target: Target) -> str | None:
    """Why the target cannot follow the original across a switch."""
    if target.engine is not None:
        return "an engine takes a long prompt in pieces, and the first would not know how long it is"
    if target.lookup is not None:
        return "a step of drafted tokens would switch before the first of them"
    if restart is not None and restart not in RESTARTING_TYPES:
        lengths = " or ".join(str(n) for n in RESTARTING_TYPES)
        return (
            "there the original's generate computes its KV cache anew, which onnxruntime-genai does only "
            f"beyond {lengths} tokens"
        )
    return None
