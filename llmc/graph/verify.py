"""Check the invariants of a graph: after tracing, after every pass and before writing."""

import onnx_ir as ir

from llmc.errors import GraphError
from llmc.graph.interface import TOKEN_COUNTS, WRITE_INDICES
from llmc.graph.model import Graph


def verify_graph(graph: Graph) -> None:
    """Check a graph's names, order, interface, shapes and consumers.

    Raises:
        GraphError: The first invariant that is violated, with the value or node at fault.
    """
    _check_values(graph.graph)
    _check_interface(graph)
    _check_initializers(graph.graph)


def _check_values(graph: ir.Graph) -> None:
    names: dict[str, ir.Value] = {}
    available: set[ir.Value] = set()
    for value in [*graph.inputs, *graph.initializers.values()]:
        _claim(names, value)
        available.add(value)
    for node in graph:
        for source in node.inputs:
            if source is not None and source not in available:
                raise GraphError(
                    f"node {node.name} ({node.op_type}) reads {source.name}, which no earlier node produces"
                )
        for output in node.outputs:
            if output.name != "":
                _claim(names, output)
            available.add(output)
    for output in graph.outputs:
        if output not in available:
            raise GraphError(f"output {output.name} is not produced by any node")


def _claim(names: dict[str, ir.Value], value: ir.Value) -> None:
    if not value.name:
        raise GraphError(f"a value has no name: {value!r}")
    if names.setdefault(value.name, value) is not value:
        raise GraphError(f"two values are called {value.name}")


def _check_interface(graph: Graph) -> None:
    for value in [*graph.graph.inputs, *graph.graph.outputs]:
        if value.shape is None or value.dtype is None:
            raise GraphError(f"{value.name} has no shape or no element type")
    for value in graph.graph.inputs:
        if not value.uses():
            raise GraphError(f"input {value.name} has no consumer")
    inputs = {str(v.name) for v in graph.graph.inputs}
    outputs = {str(v.name) for v in graph.graph.outputs}
    required_inputs = {"input_ids", WRITE_INDICES if WRITE_INDICES in inputs else "attention_mask"}
    required_outputs = {"logits"}
    for slot in graph.cache:
        required_inputs |= set(slot.pasts)
        required_outputs |= {slot.present_key, slot.present_value}
    for state in graph.states:
        required_inputs.add(state.past)
        required_outputs.add(state.present)
    if missing := required_inputs - inputs:
        raise GraphError(f"the graph has no input {', '.join(sorted(missing))}")
    optional = {TOKEN_COUNTS} if WRITE_INDICES in inputs else {"position_ids"}
    if strange := inputs - required_inputs - optional:
        raise GraphError(f"the graph has unknown inputs {', '.join(sorted(strange))}")
    if required_outputs != outputs:
        wrong = sorted(required_outputs ^ outputs)
        raise GraphError(f"outputs do not match the cache: {', '.join(wrong)}")


def _check_initializers(graph: ir.Graph) -> None:
    for name, value in graph.initializers.items():
        if value.const_value is None:
            raise GraphError(f"initializer {name} has no data")
        if not value.uses():
            raise GraphError(f"weight {name} is not read by any node")
