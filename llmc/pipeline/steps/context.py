"""Limit the context of an artifact to the length at which its runtime still reproduces the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmc.backends import backend_of
from llmc.config import Target
from llmc.graph.switches import rope_switches

if TYPE_CHECKING:
    from llmc.graph.model import Graph


def limit_context(graph: Graph, config: Any, target: Target) -> str | None:
    """End the context of `graph` before the first switch that the target's runtime cannot reproduce.

    Args:
        graph: The traced graph; changed in place.
        config: The model's transformers configuration.

    Returns:
        A note for the user; None if the context is unchanged.
    """
    length = graph.max_length
    backend = backend_of(target)
    slots = backend.capacity(target)
    capacity = length if slots is None else slots
    switches = [at for at in rope_switches(config) if capacity is None or at < capacity]
    if graph.restart not in switches:
        graph.restart = None
    if not switches:
        return None
    reason = backend.switch_obstacle(target, graph.restart)
    if reason is None:
        return None
    graph.max_length, graph.restart = switches[0], None
    return (
        f"the context ends at {switches[0]} tokens of {length or 'any number'}, before the rotary embedding "
        f"switches to its long factors: {reason}"
    )
