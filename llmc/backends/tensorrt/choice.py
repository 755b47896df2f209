"""Add an output to an engine that its graph does not have: each row's most likely token.

A step that only needs that token reads 4 bytes of a row instead of all logits, and nothing is searched on the
host. The output is added behind the logits when an engine is built; model.onnx and its interface lack it.
In engines of TensorRT-RTX 1.7 it costs two kernels or three, and changes no other (docs/engines.md). Of equal
logits it may take any; a search on the host takes the first.
"""

from typing import Any

from llmc.graph.interface import Interface, TensorSpec
from llmc.runtime.choice import CHOICE


def add_network_choice(trt: Any, network: Any) -> None:
    """Add the output `CHOICE` to a network that was parsed from a graph."""
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    logits = next(output for output in outputs if output.name == "logits")
    last = len(logits.shape) - 1
    chosen = network.add_topk(logits, trt.TopKOperation.MAX, 1, 1 << last).get_output(1)
    chosen.name = CHOICE
    network.mark_output(chosen)


def engine_outputs(interface: Interface) -> tuple[TensorSpec, ...]:
    """Return the outputs of an engine that is built from a graph with this interface."""
    logits = next(spec for spec in interface.outputs if spec.name == "logits")
    return *interface.outputs, TensorSpec(name=CHOICE, dtype="int32", shape=(*logits.shape[:-1], 1))
