"""Fuse activation functions in plain operators into one operator.

    x * sigmoid(x)                                             com.microsoft QuickGelu, alpha 1 (SiLU)
    x * sigmoid(1.702 x)                                       com.microsoft QuickGelu, alpha 1.702
    0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x ** 3)))       Gelu, approximate "tanh", ONNX opset 20

The formulas are from Hendrycks and Gimpel 2016.
"""

import math
from dataclasses import dataclass

import onnx_ir as ir

from llmc.graph.domains import MICROSOFT
from llmc.graph.edit import Site, drop_dead, take_over
from llmc.graph.match import find_nodes, is_scalar, made_by, operands, scalar_of
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport


@dataclass(frozen=True)
class Activation:
    name: str = "activation"
    summary: str = "SiLU and GELU as one operator"

    def run(self, graph: Graph) -> PassReport:
        applied: list[int | None] = []
        for node in find_nodes(graph.graph, "Mul"):
            if (gated := _sigmoid_gate(node)) is not None:
                source, alpha = gated
                _replace(graph.graph, node, source, "QuickGelu", MICROSOFT, {"alpha": alpha})
            elif (source_of_gelu := _tanh_gelu(node)) is not None:
                _replace(graph.graph, node, source_of_gelu, "Gelu", "", {"approximate": "tanh"})
            else:
                continue
            applied.append(layer_of(node))
        drop_dead(graph.graph)
        return PassReport(self.name, tuple(applied))


def _sigmoid_gate(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Return (x, alpha) of a product x * sigmoid(alpha x)."""
    for x, other in operands(node):
        sigmoid = made_by(other, "Sigmoid")
        if sigmoid is None:
            continue
        argument = sigmoid.inputs[0]
        if argument is x:
            return x, 1.0
        scaled = made_by(argument, "Mul")
        for inner, factor in operands(scaled) if scaled is not None else ():
            alpha = scalar_of(factor)
            if inner is x and alpha is not None:
                return x, alpha
    return None


def _tanh_gelu(node: ir.Node) -> ir.Value | None:
    """Return x of a product (0.5 x) * (1 + tanh(...)), in either order."""
    for half, rest in operands(node):
        halved, shifted = made_by(half, "Mul"), made_by(rest, "Add")
        if halved is None or shifted is None:
            continue
        for x, factor in operands(halved):
            if is_scalar(factor, 0.5) and any(
                is_scalar(one, 1.0) and _is_inner(made_by(tanh, "Tanh"), x) for tanh, one in operands(shifted)
            ):
                return x
    return None


def _is_inner(tanh: ir.Node | None, x: ir.Value) -> bool:
    """Return whether the argument of `tanh` is sqrt(2 / pi) (x + 0.044715 x ** 3)."""
    scaled = made_by(tanh.inputs[0], "Mul") if tanh is not None else None
    for total, factor in operands(scaled) if scaled is not None else ():
        added = made_by(total, "Add")
        if added is None or not is_scalar(factor, math.sqrt(2 / math.pi), 1e-5):
            continue
        for first, second in operands(added):
            cubic = made_by(second, "Mul")
            if first is x and cubic is not None and _is_cubic(cubic, x):
                return True
    return False


def _is_cubic(node: ir.Node, x: ir.Value) -> bool:
    """Return whether `node` computes 0.044715 x ** 3."""
    for power, factor in operands(node):
        cube = made_by(power, "Pow")
        if cube is not None and cube.inputs[0] is x and is_scalar(cube.inputs[1], 3.0):
            return is_scalar(factor, 0.044715, 1e-5)
    return False


def _replace(
    graph: ir.Graph, node: ir.Node, source: ir.Value, op: str, domain: str, attributes: dict[str, float | str]
) -> None:
    output = node.outputs[0]
    fused = Site(graph, node).emit(
        op, [source], f"{output.name}/{op}", domain=domain, attributes=attributes, like=output
    )
    take_over(output, fused.outputs[0])


PASS = Activation()
