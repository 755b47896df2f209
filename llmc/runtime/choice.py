"""Add the choice of the next token to a graph, so that a step copies one number from the device."""

from typing import Any

#: The output with the chosen tokens, (batch, positions, 1), int64 here and int32 in engines.
CHOICE = "most_likely_token"


def add_choice(model: Any) -> None:
    """Give an `onnx_ir.Model` the output `CHOICE` beside its logits.

    TopK chooses it: ONNX Runtime has a kernel of its own for it on CUDA, with the types of all logits.
    """
    import numpy as np
    import onnx_ir as ir

    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    one = ir.Value(name=f"{CHOICE}/count", const_value=ir.tensor(np.array([1], np.int64)))
    one.dtype, one.shape = ir.DataType.INT64, ir.Shape([1])
    graph.initializers[one.name] = one
    node = ir.node("TopK", [logits, one], {"axis": -1, "largest": 1, "sorted": 1}, num_outputs=2)
    chosen = node.outputs[1]
    chosen.name, chosen.dtype = CHOICE, ir.DataType.INT64
    chosen.shape = ir.Shape([*list(logits.shape or ())[:-1], 1])
    graph.append(node)
    graph.outputs.append(chosen)
