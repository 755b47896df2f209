"""Fuse a residual sum and its norm into one operator, which outputs the sum as well."""

from dataclasses import dataclass

import onnx_ir as ir

from llmc.graph.domains import MICROSOFT
from llmc.graph.edit import Site, drop_dead, set_value, take_over
from llmc.graph.linear import is_weight
from llmc.graph.match import dims_of, made_by
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal

_FUSED = {
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


@dataclass(frozen=True)
class SkipNorm:
    name: str = "skip-norm"
    summary: str = "residual sum and norm as one SkipSimplifiedLayerNormalization or SkipLayerNormalization"

    def run(self, graph: Graph) -> PassReport:
        applied: list[int | None] = []
        refusals: list[Refusal] = []
        for node in list(graph.graph):
            if node.op_type not in _FUSED or node.domain != "":
                continue
            add = made_by(node.inputs[0], "Add")
            if add is None:
                continue
            shapes = [dims_of(v) for v in add.inputs]
            if (
                len(shapes[0]) != 3
                or shapes[0] != shapes[1]
                or any(v is not None and is_weight(v) for v in add.inputs)
            ):
                reason = f"the norm's input is a sum of shapes {shapes[0]} and {shapes[1]}"
                refusals.append(Refusal("broadcast", reason, str(node.name), layer_of(node)))
                continue
            if any(v is not None and v.producer() is not None for v in node.inputs[1:]):
                reason = "the norm's scale or bias is computed"
                refusals.append(Refusal("computed", reason, str(node.name), layer_of(node)))
                continue
            _rewrite(graph.graph, node, add)
            applied.append(layer_of(node))
        drop_dead(graph.graph)
        return PassReport(self.name, tuple(applied), tuple(refusals))


def _rewrite(graph: ir.Graph, node: ir.Node, add: ir.Node) -> None:
    total, normed = add.outputs[0], node.outputs[0]
    fused = Site(graph, add).emit(
        _FUSED[node.op_type],
        [*add.inputs, *node.inputs[1:]],
        f"{node.name}/normed",
        domain=MICROSOFT,
        attributes={"epsilon": node.attributes["epsilon"].as_float()},
        like=normed,
        outputs=4,
    )
    fused.metadata_props.update(node.metadata_props)
    set_value(fused.outputs[3], f"{node.name}/sum", dims_of(total), total.dtype)
    take_over(total, fused.outputs[3])
    take_over(normed, fused.outputs[0])


PASS = SkipNorm()
