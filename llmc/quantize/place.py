"""Which scheme a weight gets, and quantized operators and initializers in the place of float ones."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from llmc.config import EngineScheme, Rule, Scheme, WeightRole, WeightScheme


@dataclass(frozen=True)
class QuantizedTensor:
    """How one matrix is stored.

    Args:
        name: Its initializer in the graph before quantization.
        role: Role its rule was chosen by.
        shape: As the checkpoint has it.
        scheme: None where it stays in float.
        bytes: All that is stored for it: codes, scales and any zero points, or the float matrix.
        origin: What became of the codes that the checkpoint has for it; None where it has floats.
    """

    name: str
    role: WeightRole
    shape: tuple[int, ...]
    scheme: WeightScheme | EngineScheme | None
    bytes: int
    origin: str | None = None


def choose_scheme(rules: Iterable[Rule[Scheme]], role: WeightRole, name: str) -> Scheme | None:
    """The scheme of the first rule that fits; None (float) where it says so or none fits."""
    for rule in rules:
        if rule.role in (None, role) and fnmatchcase(name, rule.match):
            return rule.scheme
    return None


def replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put `new` in the place of `old`; the last one's output takes over name, type, shape and consumers."""
    new[-1].name = old.name
    for node in new:
        node.metadata_props.update(old.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, old.outputs, new[-1].outputs)


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer with the data of `tensor`."""
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value
