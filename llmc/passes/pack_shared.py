"""Pack linear products of one activation into one product and a split: query, key and value; gate and up.

Biases are added to the parts, as before. TensorRT joins products with float weights itself but keeps
quantized products separate, each with its own kernel.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.graph.edit import Site, add_constant, drop_dead, set_value, take_over
from llmc.graph.linear import Linear, find_linears
from llmc.graph.match import dims_of
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal
from llmc.passes._pack import Projection, join, joining_obstacle


@dataclass(frozen=True)
class PackShared:
    name: str = "pack-shared"
    summary: str = "linear products of one activation as one product and a split"

    def run(self, graph: Graph) -> PassReport:
        groups: dict[ir.Value, list[Linear]] = {}
        for linear in find_linears(graph):
            groups.setdefault(linear.activation, []).append(linear)
        applied: list[int | None] = []
        refusals: list[Refusal] = []
        for group in groups.values():
            if len(group) < 2:
                continue
            projections = [Projection(linear, None, linear.output) for linear in group]
            declined, first = joining_obstacle(projections), group[0].node
            if declined is not None:
                refusals.append(Refusal(*declined, str(first.name), layer_of(first)))
                continue
            _rewrite(graph.graph, projections)
            applied.append(layer_of(first))
        drop_dead(graph.graph)
        return PassReport(self.name, tuple(applied), tuple(refusals))


def _rewrite(graph: ir.Graph, projections: list[Projection]) -> None:
    first = projections[0].linear.node
    widths = [p.linear.out_features for p in projections]
    names = [str(p.linear.weight.name).split(".")[-2] for p in projections]
    joined = join(graph, first, projections, "+".join(names))
    sizes = add_constant(graph, np.array(widths, np.int64), "split")
    lead = dims_of(joined)[:-1]
    split = Site(graph, first).emit(
        "Split",
        [joined, sizes],
        f"{joined.name}/0",
        attributes={"axis": -1},
        shape=[*lead, widths[0]],
        dtype=joined.dtype,
        outputs=len(widths),
    )
    for index, (output, width) in enumerate(zip(split.outputs, widths, strict=True)):
        set_value(output, f"{joined.name}/{index}", [*lead, width], joined.dtype)
    for projection, output in zip(projections, split.outputs, strict=True):
        take_over(projection.output, output)


PASS = PackShared()
