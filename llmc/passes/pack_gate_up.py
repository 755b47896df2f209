"""Pack gate and up projections of a gated feed-forward layer (Shazeer 2020) into one product and a split."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.graph.edit import Site, add_constant, drop_dead, set_value, take_over
from llmc.graph.match import dims_of, is_op
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal
from llmc.passes._pack import Projection, differing_codes, join, joining_obstacle, projection_of

_ACTIVATIONS = ("Sigmoid", "Gelu", "QuickGelu", "FastGelu", "Relu", "Tanh")


@dataclass(frozen=True)
class PackGateUp:
    name: str = "pack-gate-up"
    summary: str = "gate and up projections as one product and a split"

    def run(self, graph: Graph) -> PassReport:
        applied: list[int | None] = []
        refusals: list[Refusal] = []
        for node in list(graph.graph):
            pair = _pair(node)
            if pair is None:
                continue
            declined = joining_obstacle(pair) or differing_codes(pair)
            if declined is not None:
                refusals.append(Refusal(*declined, str(node.name), layer_of(node)))
                continue
            _rewrite(graph.graph, pair)
            applied.append(layer_of(node))
        drop_dead(graph.graph)
        return PassReport(self.name, tuple(applied), tuple(refusals))


def _pair(node: ir.Node) -> tuple[Projection, Projection] | None:
    """Return (gate, up) of a product activation(gate) * up."""
    if not is_op(node, "Mul") or len(node.inputs) != 2:
        return None
    for activated, plain in (node.inputs, node.inputs[::-1]):
        up = projection_of(plain)
        gate = _gate(activated)
        if up is not None and gate is not None and gate.linear.node is not up.linear.node:
            return gate, up
    return None


def _gate(value: ir.Value | None) -> Projection | None:
    """Return the projection that an activation function of one argument reads."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if is_op(node, "Mul"):  # x * sigmoid(x)
        for plain, other in (node.inputs, node.inputs[::-1]):
            gating = None if other is None else other.producer()
            if gating is not None and is_op(gating, "Sigmoid") and gating.inputs[0] is plain:
                return projection_of(plain)
        return None
    return projection_of(node.inputs[0]) if node.op_type in _ACTIVATIONS else None


def _rewrite(graph: ir.Graph, pair: tuple[Projection, Projection]) -> None:
    widths = [p.linear.out_features for p in pair]
    nodes = {p.output.producer() for p in pair}
    anchor = next(n for n in graph if n in nodes)
    joined = join(graph, anchor, pair, "gate_up_proj")
    sizes = add_constant(graph, np.array(widths, np.int64), "split")
    name = str(joined.name)
    split = Site(graph, anchor).emit(
        "Split",
        [joined, sizes],
        f"{name}/gate",
        attributes={"axis": -1},
        shape=[*dims_of(joined)[:-1], widths[0]],
        dtype=joined.dtype,
        outputs=2,
    )
    set_value(split.outputs[1], f"{name}/up", [*dims_of(joined)[:-1], widths[1]], joined.dtype)
    for projection, output in zip(pair, split.outputs, strict=True):
        take_over(projection.output, output)


PASS = PackGateUp()
