"""Generate C++ over vectors for element-wise functions of a graph, several operators in one."""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from llmc.backends.compiled.program import RowPlace, Space, Tensor, float_literal
from llmc.graph.domains import MICROSOFT
from llmc.graph.match import scalar_of

#: Largest number of leaves of a function besides weights: members a, b and c of llmc::Op.
MOST_PLACES = 3


@dataclass(frozen=True)
class Leaf:
    """An operand of a function: rows, or a vector that is the same for every row."""

    source: RowPlace | Tensor


@dataclass(frozen=True)
class Expression:
    """A function of leaves; `text` has the placeholders {0}, {1} … for them."""

    text: str
    leaves: tuple[Leaf, ...]
    width: int
    space: Space

    @property
    def places(self) -> tuple[RowPlace, ...]:
        return tuple(x.source for x in self.leaves if isinstance(x.source, RowPlace))

    @property
    def vectors(self) -> tuple[Tensor, ...]:
        return tuple(x.source for x in self.leaves if isinstance(x.source, Tensor))


def leaf(source: RowPlace | Tensor, width: int, space: Space) -> Expression:
    return Expression("{0}", (Leaf(source),), width, space)


def constant(value: float, width: int, space: Space) -> Expression:
    return Expression(f"all({float_literal(value)})", (), width, space)


def apply(pattern: str, *arguments: Expression) -> Expression:
    """Fill the arguments into $0, $1 … of `pattern`; equal leaves are loaded once."""
    leaves: list[Leaf] = []
    texts = []
    for argument in arguments:
        names = []
        for item in argument.leaves:
            if item not in leaves:
                leaves.append(item)
            names.append(f"{{{leaves.index(item)}}}")
        texts.append(argument.text.format(*names))
    text = pattern
    for index, part in enumerate(texts):
        text = text.replace(f"${index}", part)
    return Expression(text, tuple(leaves), arguments[0].width, arguments[0].space)


def _gelu(node: ir.Node) -> str:
    approximate = node.attributes.get("approximate")
    if approximate is not None and approximate.as_string() == "tanh":
        return "gelu_tanh($0)"
    return "gelu($0)"


def _quick_gelu(node: ir.Node) -> str:
    alpha = float(node.attributes["alpha"].as_float()) if "alpha" in node.attributes else 1.702
    return f"scaled_silu($0, {float_literal(alpha)})"


def _clip(node: ir.Node) -> str:
    text = "$0"
    for function, value in zip(("max", "min"), node.inputs[1:], strict=False):
        if value is not None:
            text = f"{function}({text}, all({float_literal(scalar_of(value) or 0.0)}))"
    return text


#: C++ code of the operators with one activation, by domain and name.
UNARY: dict[tuple[str, str], Callable[[ir.Node], str]] = {
    ("", "Sigmoid"): lambda node: "sigmoid($0)",
    ("", "Tanh"): lambda node: "tanh($0)",
    ("", "Relu"): lambda node: "max($0, all(0.0f))",
    ("", "Neg"): lambda node: "(-$0)",
    ("", "Exp"): lambda node: "exp($0)",
    ("", "Sqrt"): lambda node: "square_root($0)",
    ("", "Reciprocal"): lambda node: "(all(1.0f) / $0)",
    ("", "Softplus"): lambda node: "softplus($0)",
    ("", "Clip"): _clip,
    ("", "Gelu"): _gelu,
    (MICROSOFT, "Gelu"): _gelu,
    (MICROSOFT, "QuickGelu"): _quick_gelu,
}
BINARY = {"Add": "($0 + $1)", "Sub": "($0 - $1)", "Mul": "($0 * $1)", "Div": "($0 / $1)"}
