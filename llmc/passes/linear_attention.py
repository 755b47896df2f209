"""Lower `LinearAttention` to com.microsoft LinearAttention (ONNX Runtime 1.31).

The operator updates its state with every token of a step. A token that is not real gets a decay of 1, and an
update of zero: by its beta with the delta rule, otherwise by its key. The operator takes a key for each head,
so that keys of several heads are repeated.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.graph import states
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.edit import Site, add_constant, drop_dead, drop_unused_functions, require_domain, take_over
from llmc.graph.match import dims_of, find_nodes, input_of, operand
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport
from llmc.passes._real_tokens import RealTokens

OPERATOR = "LinearAttention"


@dataclass(frozen=True)
class LinearAttention:
    name: str = "linear-attention"
    summary: str = "recurrences with a state as one LinearAttention"

    def run(self, graph: Graph) -> PassReport:
        applied: list[int | None] = []
        for node in find_nodes(graph.graph, states.LINEAR_ATTENTION, DIALECT):
            _rewrite(graph.graph, node)
            applied.append(layer_of(node))
        drop_dead(graph.graph)
        if applied:
            drop_unused_functions(graph.model)
            require_domain(graph.graph, MICROSOFT)
        return PassReport(self.name, tuple(applied))


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    query, key, value, past, decay = (operand(node, i) for i in range(5))
    beta, tokens = input_of(node, 5), RealTokens(graph, operand(node, 6))
    heads, key_heads = (node.attributes[n].as_int() for n in ("heads", "key_heads"))
    site, stem = Site(graph, node), str(node.name)
    zero = add_constant(graph, np.zeros((), np.float32), "zero")
    real = tokens.real()

    def masked(x: ir.Value, name: str) -> ir.Value:
        return site.emit("Where", [real, x, zero], f"{stem}/{name}", like=x).outputs[0]

    decay = masked(decay, "decay")
    if beta is None:
        key = masked(key, "key")
    else:
        beta = masked(beta, "beta")
    width = int(str(dims_of(past)[2]))
    fused = site.emit(
        OPERATOR,
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
    """Return a key for each head, (batch, sequence, heads * width), from one for `key_heads`."""
    if key_heads == heads:
        return key
    batch, sequence, _ = dims_of(key)
    group = heads // key_heads

    def shape(*dims: int) -> ir.Value:
        return add_constant(site.graph, np.array(dims, np.int64), "shape")

    dims = [batch, sequence, key_heads, 1, width]
    split = site.emit(
        "Reshape", [key, shape(0, 0, key_heads, 1, width)], f"{stem}/keys", shape=dims, dtype=key.dtype
    )
    dims = [batch, sequence, key_heads, group, width]
    several = site.emit(
        "Expand",
        [split.outputs[0], shape(1, 1, 1, group, 1)],
        f"{stem}/repeated",
        shape=dims,
        dtype=key.dtype,
    )
    dims = [batch, sequence, heads * width]
    return site.emit(
        "Reshape",
        [several.outputs[0], shape(0, 0, heads * width)],
        f"{stem}/each",
        shape=dims,
        dtype=key.dtype,
    ).outputs[0]


PASS = LinearAttention()
