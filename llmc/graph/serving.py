"""State how onnxruntime-genai serves a graph: its type of model, by the tensors that go from step to step.

As in onnxruntime-genai 0.18 (its src/models): the type "decoder" feeds a KV cache, and states in pairs of a
convolution and a recurrence; the type "lfm2" feeds layers that have either a KV cache or a convolution's
state, and is told by `layer_types` which. Either allocates the states of a kind by the shape of the first.
Two types recompute the KV cache beyond a length.
"""

from collections.abc import Sequence

from llmc.errors import UnsupportedError
from llmc.graph.interface import CacheSlot, Interface, StateSlot
from llmc.graph.switches import RESTARTING_TYPES

_CONVOLUTIONS = "lfm2"


def runtime_type(interface: Interface) -> str:
    """Return `model.type` of genai_config.json for a graph.

    Raises:
        UnsupportedError: No type feeds the graph's states.
    """
    if (obstacle := states_obstacle(interface.cache, interface.states)) is not None:
        raise _unserved(obstacle)
    if interface.restart is not None:
        if interface.states:
            raise _unserved("states of fixed size beside a KV cache that is recomputed")
        return RESTARTING_TYPES[interface.restart]
    convolutions, recurrences = layers_by_kind(interface.states)
    return "decoder" if convolutions == recurrences else _CONVOLUTIONS


def states_obstacle(cache: Sequence[CacheSlot], states: Sequence[StateSlot]) -> str | None:
    """Return what no type serves of the states beside a KV cache; None if a type serves them."""
    convolutions, recurrences = layers_by_kind(states)
    if len(states) > len(convolutions) + len(recurrences):
        return "several states of one kind in a layer"
    shapes = {kind: {state.shape for state in states if state.kind == kind} for kind in ("conv", "recurrent")}
    if any(len(different) > 1 for different in shapes.values()):
        return "states of one kind with different shapes"
    if convolutions == recurrences:
        return None
    if recurrences:
        alone = sorted(convolutions ^ recurrences)
        return f"a convolution or a recurrence without the other in layers {alone}"
    keys = {slot.layer for slot in cache}
    if convolutions & keys or convolutions | keys != set(range(max(convolutions | keys) + 1)):
        return "convolutions in layers with attention, or layers with neither"
    if len({(slot.kv_heads, slot.key_width) for slot in cache}) > 1:
        return "convolutions beside a KV cache of several shapes"
    return None


def layer_types(interface: Interface) -> list[str] | None:
    """Return what each layer keeps, for the type that is told; None for the others."""
    if runtime_type(interface) != _CONVOLUTIONS:
        return None
    convolutions, _ = layers_by_kind(interface.states)
    return ["conv" if n in convolutions else "full_attention" for n in range(interface.last_layer + 1)]


def layers_by_kind(states: Sequence[StateSlot]) -> tuple[set[int], set[int]]:
    """Return the layers that keep a convolution's state, and those that keep a recurrence's."""
    convolutions, recurrences = (
        {state.layer for state in states if state.kind == kind} for kind in ("conv", "recurrent")
    )
    return convolutions, recurrences


def _unserved(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"onnxruntime-genai does not serve {what}",
        hint="llmc compiles the graph, but nothing could generate text from it",
    )
