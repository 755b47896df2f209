"""Lower `CausalConv` and `LinearAttention` to com.microsoft's operators (ONNX Runtime 1.31).

CausalConvWithState and LinearAttention count every token of a step. A convolution's inputs that are not real
are set to zero, and its state is taken after the last real token of each row, where the operator would take
it after the last column. In a recurrence, a token that is not real gets a decay of 1, and an update of zero:
by its beta with the delta rule, otherwise by its key. The operator takes a key for each head, so that keys of
several heads are repeated.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.graph import states
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.edit import Site, add_constant, drop_dead, drop_unused_functions, set_value, take_over
from llmc.graph.match import dims_of, find_nodes, input_of, operand
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport
from llmc.passes._step import StepValues

CONVOLUTION, RECURRENCE = "CausalConvWithState", "LinearAttention"
_INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class States:
    name: str = "states"
    summary: str = "convolutions and recurrences with a state as CausalConvWithState and LinearAttention"

    def run(self, graph: Graph) -> PassReport:
        lowerings = ((states.CAUSAL_CONV, _convolve), (states.LINEAR_ATTENTION, _recur))
        found = [(n, lower) for op, lower in lowerings for n in find_nodes(graph.graph, op, DIALECT)]
        if not found:
            return PassReport(self.name, ())
        step = StepValues(graph.graph)
        applied = [layer_of(node) for node, _ in found]
        for node, lower in found:
            lower(graph.graph, node, step)
        drop_dead(graph.graph)
        drop_unused_functions(graph.model)
        return PassReport(self.name, tuple(applied))


def _convolve(graph: ir.Graph, node: ir.Node, step: StepValues) -> None:
    """Replace a `CausalConv`; x is (batch, channels, sequence), its state (batch, channels, taps - 1)."""
    x, weight, past = operand(node, 0), operand(node, 1), operand(node, 3)
    site, stem = Site(graph, node), str(node.name)
    output, present = node.outputs
    batch, channels, sequence = dims_of(x)
    taken = int(str(dims_of(past)[2]))
    zero = add_constant(graph, np.zeros((), (x.dtype or ir.DataType.FLOAT).numpy()), "zero")
    turned = site.emit(
        "Transpose",
        [step.real_tokens()],
        f"{stem}/real",
        attributes={"perm": [0, 2, 1]},
        shape=[batch, 1, sequence],
        dtype=ir.DataType.BOOL,
    )
    masked = site.emit("Where", [turned.outputs[0], x, zero], f"{stem}/masked", like=x).outputs[0]
    fused = site.emit(
        CONVOLUTION,
        [masked, weight, input_of(node, 2), past],
        f"{stem}/output",
        domain=MICROSOFT,
        attributes={"activation": "silu" if node.attributes["silu"].as_int() else "none", "ndim": 1},
        like=output,
        outputs=2,
    )
    set_value(fused.outputs[1], f"{stem}/after", dims_of(past), x.dtype)
    whole = site.emit(
        "Concat",
        [past, masked],
        f"{stem}/whole",
        attributes={"axis": 2},
        shape=[batch, channels, "whole"],
        dtype=x.dtype,
    )
    columns = add_constant(graph, np.arange(taken, dtype=np.int64)[None, None], "columns")
    place = site.emit(
        "Add", [step.last_tokens(), columns], f"{stem}/place", shape=[batch, 1, taken], dtype=_INT64
    )
    sizes = site.emit("Shape", [past], f"{stem}/shape", shape=[3], dtype=_INT64)
    index = site.emit(
        "Expand",
        [place.outputs[0], sizes.outputs[0]],
        f"{stem}/index",
        shape=dims_of(past),
        dtype=_INT64,
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


def _recur(graph: ir.Graph, node: ir.Node, step: StepValues) -> None:
    """Replace a `LinearAttention`; shapes as in `llmc.graph.states`."""
    query, key, value, past, decay = (operand(node, i) for i in range(5))
    beta = input_of(node, 5)
    heads, key_heads = (node.attributes[n].as_int() for n in ("heads", "key_heads"))
    site, stem = Site(graph, node), str(node.name)
    zero = add_constant(graph, np.zeros((), np.float32), "zero")

    def masked(x: ir.Value, name: str) -> ir.Value:
        return site.emit("Where", [step.real_tokens(), x, zero], f"{stem}/{name}", like=x).outputs[0]

    decay = masked(decay, "decay")
    if beta is None:
        key = masked(key, "key")
    else:
        beta = masked(beta, "beta")
    width = int(str(dims_of(past)[2]))
    fused = site.emit(
        RECURRENCE,
        [query, _repeat(site, stem, key, key_heads, heads, width), value, past, decay, beta],
        f"{stem}/output",
        domain=MICROSOFT,
        attributes={
            "update_rule": "gated" if beta is None else "gated_delta",
            "q_num_heads": key_heads,
            "kv_num_heads": heads,
            "scale": node.attributes["scale"].as_float(),
        },
        like=node.outputs[0],
        outputs=2,
    )
    for old, new in zip(node.outputs, fused.outputs, strict=True):
        take_over(old, new)


def _repeat(site: Site, stem: str, key: ir.Value, key_heads: int, heads: int, width: int) -> ir.Value:
    """Return a key for each head, (batch, sequence, heads * width), from one for each of `key_heads`."""
    if key_heads == heads:
        return key
    batch, sequence, _ = dims_of(key)
    group = heads // key_heads
    for op, name, sizes, dims in (
        ("Reshape", "keys", (0, 0, key_heads, 1, width), [key_heads, 1, width]),
        ("Expand", "repeated", (1, 1, 1, group, 1), [key_heads, group, width]),
        ("Reshape", "each", (0, 0, heads * width), [heads * width]),
    ):
        shape = add_constant(site.graph, np.array(sizes, np.int64), "shape")
        made = site.emit(op, [key, shape], f"{stem}/{name}", shape=[batch, sequence, *dims], dtype=key.dtype)
        key = made.outputs[0]
    return key


PASS = States()
