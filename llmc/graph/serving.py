"""State how onnxruntime-genai serves a graph: its type of model, by the tensors that go from step to step.

As in onnxruntime-genai 0.18 (its src/models): the type "decoder" feeds a KV cache, and states in pairs of a
convolution and a recurrence; the type "lfm2" feeds layers that have either a KV cache or a convolution's
state, and is told by `layer_types` which. Two types recompute the KV cache beyond a length.
"""

from llmc.errors import UnsupportedError
from llmc.graph.interface import Interface
from llmc.graph.switches import RESTARTING_TYPES

_CONVOLUTIONS = "lfm2"


def runtime_type(interface: Interface) -> str:
    """Return `model.type` of genai_config.json for a graph.

    Raises:
        UnsupportedError: No type feeds the graph's states.
    """
    layers = _layers_by_kind(interface)
    if len(interface.states) > len(layers["conv"]) + len(layers["recurrent"]):
        raise _unserved("several states of one kind in a layer")
    if interface.restart is not None:
        if interface.states:
            raise _unserved("states of fixed size beside a KV cache that is recomputed")
        return RESTARTING_TYPES[interface.restart]
    if not interface.states or layers["conv"] == layers["recurrent"]:
        return "decoder"
    if layers["recurrent"]:
        alone = sorted(layers["conv"] ^ layers["recurrent"])
        raise _unserved(f"a convolution or a recurrence without the other in layers {alone}")
    if layers["conv"] & layers["key"] or layers["conv"] | layers["key"] != set(
        range(interface.last_layer + 1)
    ):
        raise _unserved("convolutions in layers with attention, or layers with neither")
    return _CONVOLUTIONS


def layer_types(interface: Interface) -> list[str] | None:
    """Return what each layer keeps, for the type that is told; None for the others."""
    if runtime_type(interface) != _CONVOLUTIONS:
        return None
    convolutions = _layers_by_kind(interface)["conv"]
    return ["conv" if n in convolutions else "full_attention" for n in range(interface.last_layer + 1)]


def _layers_by_kind(interface: Interface) -> dict[str, set[int]]:
    tensors = interface.served_tensors
    return {kind: {layer for layer, *_ in tensors.get(kind, ())} for kind in ("key", "conv", "recurrent")}


def _unserved(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"onnxruntime-genai does not serve {what}",
        hint="llmc compiles the graph, but nothing could generate text from it",
    )
