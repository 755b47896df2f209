"""Lower `CausalConv` to com.microsoft CausalConvWithState (ONNX Runtime 1.31).

The operator counts every token of a step. Inputs that are not real are set to zero before it, and the state
is taken after the last real token of each row, where the operator would take it after the last column.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.graph import states
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.edit import (
    Site,
    add_constant,
    drop_dead,
    drop_unused_functions,
    require_domain,
    set_value,
    take_over,
)
from llmc.graph.match import dims_of, find_nodes, input_of, operand
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport
from llmc.passes._real_tokens import RealTokens

OPERATOR = "CausalConvWithState"


@dataclass(frozen=True)
class CausalConv:
    name: str = "causal-conv"
    summary: str = "convolutions with a state as one CausalConvWithState"

    def run(self, graph: Graph) -> PassReport:
        applied: list[int | None] = []
        for node in find_nodes(graph.graph, states.CAUSAL_CONV, DIALECT):
            _rewrite(graph.graph, node)
            applied.append(layer_of(node))
        drop_dead(graph.graph)
        if applied:
            drop_unused_functions(graph.model)
            require_domain(graph.graph, MICROSOFT)
        return PassReport(self.name, tuple(applied))


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    x, weight, past = operand(node, 0), operand(node, 1), operand(node, 3)
    tokens = RealTokens(graph, operand(node, 4))
    site, stem = Site(graph, node), str(node.name)
    output, present = node.outputs
    zero = add_constant(graph, np.zeros((), (x.dtype or ir.DataType.FLOAT).numpy()), "zero")
    batch, channels, sequence = dims_of(x)
    turn = {"perm": [0, 2, 1]}
    real = site.emit(
        "Transpose",
        [tokens.real()],
        f"{stem}/real",
        attributes=turn,
        shape=[batch, 1, sequence],
        dtype=ir.DataType.BOOL,
    )
    masked = site.emit("Where", [real.outputs[0], x, zero], f"{stem}/masked", like=x).outputs[0]
    silu = node.attributes["silu"].as_int()
    fused = site.emit(
        OPERATOR,
        [masked, weight, input_of(node, 2), past],
        f"{stem}/output",
        domain=MICROSOFT,
        attributes={"activation": "silu" if silu else "none", "ndim": 1},
        like=output,
        outputs=2,
    )
    set_value(fused.outputs[1], f"{stem}/after", dims_of(past), x.dtype)
    taken = dims_of(past)[2]
    whole = site.emit(
        "Concat",
        [past, masked],
        f"{stem}/whole",
        attributes={"axis": 2},
        shape=[batch, channels, "whole"],
        dtype=x.dtype,
    )
    columns = add_constant(graph, np.arange(int(str(taken)), dtype=np.int64)[None, None], "columns")
    place = site.emit(
        "Add",
        [tokens.ends(), columns],
        f"{stem}/place",
        shape=[batch, 1, taken],
        dtype=ir.DataType.INT64,
    )
    index = site.emit(
        "Expand",
        [
            place.outputs[0],
            site.emit("Shape", [past], f"{stem}/shape", shape=[3], dtype=ir.DataType.INT64).outputs[0],
        ],
        f"{stem}/index",
        shape=dims_of(past),
        dtype=ir.DataType.INT64,
    )
    state = site.emit(
        "GatherElements",
        [whole.outputs[0], index.outputs[0]],
        f"{stem}/state",
        attributes={"axis": 2},
        like=present,
    )
    take_over(output, fused.outputs[0])
    take_over(present, state.outputs[0])


PASS = CausalConv()
