"""Pack query, key and value projections into one product that feeds attention packed."""

from dataclasses import dataclass

import onnx_ir as ir

from llmc.graph.domains import MICROSOFT
from llmc.graph.edit import drop_dead
from llmc.graph.match import is_op, only_user
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal
from llmc.passes._pack import differing_codes, join, joining_obstacle, projection_of


@dataclass(frozen=True)
class PackQkv:
    name: str = "pack-qkv"
    summary: str = "query, key and value projections as one product, attention on packed QKV"

    def run(self, graph: Graph) -> PassReport:
        applied: list[int | None] = []
        refusals: list[Refusal] = []
        for node in list(graph.graph):
            if not is_op(node, "GroupQueryAttention", MICROSOFT) or node.inputs[1] is None:
                continue
            declined = _rewrite(graph.graph, node)
            if declined is None:
                applied.append(layer_of(node))
            else:
                refusals.append(Refusal(*declined, str(node.name), layer_of(node)))
        drop_dead(graph.graph)
        return PassReport(self.name, tuple(applied), tuple(refusals))


def _rewrite(graph: ir.Graph, node: ir.Node) -> tuple[str, str] | None:
    candidates = [projection_of(v) for v in node.inputs[:3]]
    projections = [p for p in candidates if p is not None]
    if len(projections) < 3:
        return (
            "not-a-projection",
            "query, key or value is not a plain projection (normalised, rotated or split)",
        )
    if any(only_user(p.output) is not node for p in projections):
        return "shared", "other nodes read a projection as well"
    declined = joining_obstacle(projections) or differing_codes(projections)
    if declined is not None:
        return declined
    node.replace_input_with(0, join(graph, node, projections, "qkv_proj"))
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)
    return None


PASS = PackQkv()
