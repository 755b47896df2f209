"""Replace a Gemm (ONNX opset 13) by MatMul and Add, which the quantizer and the other passes support.

    alpha = beta = 1, activation not transposed: y = x W + b, W (in_features, out_features), or its
    transpose as torch stores it

Tracing turns `addmm`, which takes matrices, into a Gemm; reshapes to rows and back around it are removed as
well.
"""

from dataclasses import dataclass

import onnx_ir as ir

from llmc.graph.edit import Site, drop_dead, take_over
from llmc.graph.linear import is_weight
from llmc.graph.match import dims_of, find_nodes, is_op, made_by, only_user
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal


@dataclass(frozen=True)
class LinearPass:
    name: str = "linear"
    summary: str = "Gemm as MatMul and Add"

    def run(self, graph: Graph) -> PassReport:
        applied: list[int | None] = []
        refusals: list[Refusal] = []
        for node in find_nodes(graph.graph, "Gemm"):
            declined = _obstacle(node)
            if declined is not None:
                refusals.append(Refusal(*declined, str(node.name), layer_of(node)))
                continue
            _rewrite(graph.graph, node)
            applied.append(layer_of(node))
        drop_dead(graph.graph)
        return PassReport(self.name, tuple(applied), tuple(refusals))


def _obstacle(node: ir.Node) -> tuple[str, str] | None:
    """Return the code and the reason why `node` stays."""
    for name in ("alpha", "beta"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.as_float() != 1.0:
            return "gemm-scale", f"{name} is {attribute.as_float()}, not 1"
    if node.attributes.get_int("transA", 0):
        return "gemm-transposed", "its activation is transposed"
    weight = node.inputs[1]
    if weight is None or not is_weight(weight):
        return "computed", "its factor is not a weight"
    return None


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    rows, weight, *rest = node.inputs
    old = node.outputs[0]
    width = dims_of(old)[-1]
    to_rows, back = made_by(rows, "Reshape"), only_user(old)
    if to_rows is not None and back is not None and is_op(back, "Reshape"):
        source, lifted = to_rows.inputs[0], back.outputs[0]
        if dims_of(lifted) == [*dims_of(source)[:-1], width]:
            rows, old = source, lifted
    site, name = Site(graph, node), str(node.outputs[0].name)
    if node.attributes.get_int("transB", 0) and weight is not None:
        dims = dims_of(weight)
        turned = site.emit(
            "Transpose",
            [weight],
            f"{name}/weight",
            attributes={"perm": [1, 0]},
            shape=dims[::-1],
            dtype=weight.dtype,
        )
        weight = turned.outputs[0]
    result = site.emit("MatMul", [rows, weight], f"{name}/product", like=old)
    if rest and rest[0] is not None:
        result = site.emit("Add", [result.outputs[0], rest[0]], f"{name}/biased", like=old)
    take_over(old, result.outputs[0])


PASS = LinearPass()
