"""Find every node of a graph that TensorRT would refuse, before anything is written.

TensorRT's parser stops at the first node that it refuses. Therefore each node is parsed on its own: a model
with only that node, with the types of its inputs as the graph states them. Equal nodes are parsed once.
Weights are never read: zeros replace them. A node with an input of unknown type cannot be parsed alone, and
is unknown, not refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.backends.tensorrt.engine import load_library
from llmc.backends.tensorrt.log import BuildLog, make_logger
from llmc.backends.tensorrt.support import Library, plan_engines
from llmc.catalog import list_targets
from llmc.config import Target
from llmc.errors import UnsupportedError
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.match import constant_of
from llmc.graph.model import layer_of
from llmc.profile import Profile
from llmc.records import Record

#: Constants up to this many elements are part of a signature: axes, shapes, scalars, sizes.
_SMALL = 64
#: Advice by domain and by TensorRT's error code; the first that applies.
_BY_DOMAIN = {
    MICROSOFT: "an operator of ONNX Runtime: remove the pass that creates it from the target",
    DIALECT: "an operator of llmc's dialect: the target lacks a pass that lowers it",
}
_BY_CODE = {
    "UNSUPPORTED_NODE_DATATYPE": "store or compute it in another type: float16, or a symmetric int8 or int4",
    "UNSUPPORTED_NODE_DYNAMIC": "TensorRT needs this size fixed: rewrite the node in a pass of your own",
}
_OTHERWISE = "ONNX Runtime computes it on the same GPU: build for a cuda target, or rewrite it in a pass"


class NodeFinding(Record):
    """Equal nodes that TensorRT would refuse, or that its parser cannot check.

    Args:
        operator: Operator name, `domain::name` outside of the standard domain.
        inputs: Type and shape of each input, such as "float16[batch, 4, sequence, 16]".
        reason: TensorRT's message, or why it cannot check them.
        advice: What the user can do.
        node: Name of the first node.
        count: Number of nodes.
        layers: Decoder layers that contain them, ascending.
    """

    operator: str
    inputs: tuple[str, ...]
    reason: str
    advice: str
    node: str
    count: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class NodeReport:
    """TensorRT's answers on the nodes of a graph.

    Args:
        version: Version of the library that was asked.
        nodes: Number of nodes of the graph.
        signatures: Number of distinct nodes, each asked once.
        refused: Refused nodes by signature, in graph order.
        unknown: Nodes that cannot be checked, by signature, in graph order.
    """

    version: str
    nodes: int
    signatures: int
    refused: tuple[NodeFinding, ...]
    unknown: tuple[NodeFinding, ...]


class NodeChecker:
    """The parser of an installed library.

    Raises:
        ResourceError: It is not installed.
    """

    def __init__(self, library: Library) -> None:
        self.library = library.value
        self._module = load_library(library)

    def obstacles(
        self, target: Target, profiles: Sequence[Profile]
    ) -> Iterator[tuple[Profile, UnsupportedError]]:
        """Yield each profile that cannot have an engine of the target, and why.

        Raises:
            ConfigError: A profile states no compute capability.
        """
        targets = [listed.document for listed in list_targets()]
        for profile in profiles:
            try:
                plan_engines(target, [profile], targets)
            except UnsupportedError as error:
                yield profile, error

    def check(self, model: ir.Model) -> NodeReport:
        """Ask about every node of a lowered graph."""
        return check_nodes(model, self._module)


def check_nodes(model: ir.Model, trt: Any) -> NodeReport:
    """Ask TensorRT about every node of `model`.

    Args:
        model: A lowered graph; its weights may be lazy and are not read.
        trt: The module that `tensorrt.load_library` returns.
    """
    alike: dict[object, list[ir.Node]] = {}
    for node in model.graph:
        alike.setdefault(_signature(node), []).append(node)
    log = BuildLog()
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    refused, unknown = [], []
    for nodes in alike.values():
        why = _untyped(nodes[0])
        if why is not None:
            unknown.append(_finding(nodes, why, "earlier nodes decide; see the refused nodes"))
        elif (refusal := _ask(trt, builder, logger, model, nodes[0])) is not None:
            code, reason = refusal
            advice = _BY_DOMAIN.get(nodes[0].domain) or _BY_CODE.get(code, _OTHERWISE)
            refused.append(_finding(nodes, reason, advice))
    return NodeReport(
        trt.__version__, sum(map(len, alike.values())), len(alike), tuple(refused), tuple(unknown)
    )


def _signature(node: ir.Node) -> object:
    """Compute a key that is equal for nodes that the parser cannot distinguish except by name."""
    inputs = tuple(None if v is None else (_describe(v), _content(v)) for v in node.inputs)
    attributes = tuple(sorted((k, str(a.type), str(a.value)) for k, a in node.attributes.items()))
    outputs = tuple(bool(v.name) and (bool(v.uses()) or v.is_graph_output()) for v in node.outputs)
    return node.domain, node.op_type, node.overload, attributes, inputs, outputs


def _describe(value: ir.Value) -> str:
    kind = "unknown" if value.dtype is None else value.dtype.name.lower()
    dims = "?" if value.shape is None else ", ".join(str(dim) for dim in value.shape)
    return f"{kind}[{dims}]"


def _content(value: ir.Value) -> object:
    """Return the contents of a constant, as far as the parser may read it."""
    constant = _constant(value)
    if constant is None:
        return None
    return constant.numpy().tobytes() if constant.size <= _SMALL else "weight"


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    return value.const_value if value.const_value is not None else constant_of(value)


def _untyped(node: ir.Node) -> str | None:
    for value in node.inputs:
        if value is not None and (value.dtype is None or value.shape is None):
            return f"the type or the shape of its input {value.name} is not known"
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return "it contains a graph of its own, which cannot be checked alone"
    return None


def _ask(trt: Any, builder: Any, logger: Any, model: ir.Model, node: ir.Node) -> tuple[str, str] | None:
    """Return the error code and message with which the parser refuses the node; None if it accepts it."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if parser.parse(ir.to_proto(_alone(model, node)).SerializeToString()):
        return None
    error = parser.get_error(0)
    return error.code().name, " ".join(error.desc().split())


def _alone(model: ir.Model, node: ir.Node) -> ir.Model:
    """Create a model of a copy of `node`."""
    copies: dict[ir.Value, ir.Value] = {}
    for value in dict.fromkeys(v for v in node.inputs if v is not None):
        copies[value] = ir.Value(
            name=value.name, shape=value.shape, type=value.type, const_value=_stand_in(value)
        )
    outputs = [ir.Value(name=v.name, shape=v.shape, type=v.type) for v in node.outputs]
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if v is None else copies[v] for v in node.inputs],
        node.attributes.values(),
        overload=node.overload,
        outputs=outputs,
        name=node.name,
    )
    graph = ir.Graph(
        [v for v in copies.values() if v.const_value is None],
        [v for v in outputs if v.name],
        nodes=[copy],
        initializers=[v for v in copies.values() if v.const_value is not None],
        opset_imports=dict(model.graph.opset_imports),
        name="node",
    )
    functions = [f for f in model.functions.values() if f.domain == node.domain]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)


def _stand_in(value: ir.Value) -> ir.TensorProtocol | None:
    """Return a small constant unchanged, ones for a quantized weight and its scales, None for a float weight.

    The parser accepts a float weight as an input too.
    """
    constant = _constant(value)
    if constant is None or constant.size <= _SMALL:
        return constant
    if not any(use.node.op_type in ("DequantizeLinear", "QuantizeLinear") for use in value.uses()):
        return None
    return ir.Tensor(np.ones(constant.shape.numpy(), constant.dtype.numpy()), name=value.name)


def _finding(nodes: list[ir.Node], reason: str, advice: str) -> NodeFinding:
    first = nodes[0]
    return NodeFinding(
        operator=f"{first.domain}::{first.op_type}" if first.domain else first.op_type,
        inputs=tuple("absent" if v is None else _describe(v) for v in first.inputs),
        reason=reason,
        advice=advice,
        node=str(first.name),
        count=len(nodes),
        layers=tuple(sorted({layer for node in nodes if (layer := layer_of(node)) is not None})),
    )
