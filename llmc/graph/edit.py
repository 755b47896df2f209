"""Change a graph: add nodes and initializers, replace values and nodes, remove dead ones."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from llmc.arrays import Array
from llmc.errors import GraphError
from llmc.graph.domains import STANDARD, VERSION
from llmc.graph.model import LAYER
from llmc.graph.weights import LazyWeight, Rows

Attribute = int | float | str | Sequence[int] | ir.Attr

#: ONNX releases pair IR version 11 with opset 23 and later (onnx/docs/Versioning.md).
_IR_OF_OPSET_23 = 11


@dataclass(frozen=True)
class Site:
    """The place where new nodes are inserted: before `anchor`.

    Args:
        graph: The graph to change.
        anchor: The node before which new nodes are inserted.
        metadata: Metadata of the new nodes; if None, the layer of `anchor`.
        after: Insert them directly after `anchor` instead; of several nodes, the newest comes first.
    """

    graph: ir.Graph
    anchor: ir.Node
    metadata: Mapping[str, str] | None = None
    after: bool = False

    def emit(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = STANDARD,
        attributes: Mapping[str, Attribute] | None = None,
        like: ir.Value | None = None,
        shape: Iterable[int | str | ir.SymbolicDim] | None = None,
        dtype: ir.DataType | None = None,
        outputs: int = 1,
        node_name: str | None = None,
    ) -> ir.Node:
        """Insert a new node, and return it.

        Its first output is called `name` and has the given shape and type, or those of `like`. Further
        outputs have an empty name, which omits them, until `set_value` names them. The node is called
        `node_name`; `name` and its operator if None.
        """
        node = ir.Node(
            domain,
            op,
            inputs,
            ir.convenience.convert_attributes(dict(attributes or {})),
            num_outputs=outputs,
            name=node_name or f"{name}/{op}",
            metadata_props=self._metadata(),
        )
        for output in node.outputs[1:]:
            output.name = ""
        if like is not None:
            shape = shape if shape is not None else tuple(like.shape or ())
            dtype = dtype or like.dtype
        set_value(node.outputs[0], name, shape, dtype)
        if self.after:
            self.graph.insert_after(self.anchor, node)
        else:
            self.graph.insert_before(self.anchor, node)
        if domain != STANDARD:
            require_domain(self.graph, domain)
        return node

    def _metadata(self) -> dict[str, str]:
        if self.metadata is not None:
            return dict(self.metadata)
        layer = self.anchor.metadata_props.get(LAYER)
        return {} if layer is None else {LAYER: layer}


def set_value(
    value: ir.Value,
    name: str | None,
    shape: Iterable[int | str | ir.SymbolicDim] | None,
    dtype: ir.DataType | None,
) -> ir.Value:
    """Set the name of a value, and its shape and element type where they are given; return the value."""
    value.name = name
    if shape is not None:
        value.shape = ir.Shape(shape)
    if dtype is not None:
        value.type = ir.TensorType(dtype)
    return value


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Replace `old` by `new`, which takes its name, shape, type, users and its position as a graph output."""
    name, old.name = old.name, None
    new.name = name
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def replace_node(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Replace the node `old` by the nodes `new`.

    The last new node takes the name of `old`, and its output takes the name, type, shape and users of the old
    output. All new nodes take the metadata of `old`.
    """
    new[-1].name = old.name
    for node in new:
        node.metadata_props.update(old.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, old.outputs, new[-1].outputs)


def require_domain(graph: ir.Graph, domain: str) -> None:
    """Import an operator domain other than the standard one, unless the graph already imports it."""
    graph.opset_imports.setdefault(domain, VERSION)


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Add an initializer with the name and data of `tensor`."""
    value = ir.val(tensor.name, const_value=tensor)
    graph.register_initializer(value)
    return value


def name_constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Return the initializer `name`; add it with the data of `array` if the graph does not have it yet."""
    existing = graph.initializers.get(name)
    return existing if existing is not None else add_initializer(graph, ir.tensor(array, name=name))


def add_constant(graph: ir.Graph, array: Array, hint: str) -> ir.Value:
    """Return an initializer with the data of `array`; equal data gives the same initializer.

    Args:
        hint: Prefix of its name, which ends in a digest of the data.
    """
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    digest.update(repr((array.shape, array.dtype.str)).encode())
    name = f"{hint}_{digest.hexdigest()[:12]}"
    existing = graph.initializers.get(name)
    return existing if existing is not None else add_initializer(graph, ir.tensor(array, name=name))


def add_weight(graph: ir.Graph, name: str, rows: Rows) -> ir.Value:
    """Return an initializer with the values of `rows`; reuse the existing one if `name` has the same rows.

    Raises:
        GraphError: `name` is used by another value.
    """
    existing = graph.initializers.get(name)
    if existing is None:
        return add_initializer(graph, LazyWeight.from_rows(name, rows))
    tensor = existing.const_value
    if not isinstance(tensor, LazyWeight) or tensor.rows != rows:
        raise GraphError(f"two weights would be called {name}")
    return existing


def drop_dead(graph: ir.Graph) -> None:
    """Remove nodes whose outputs nothing reads, then initializers that nothing reads."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def drop_unused_functions(model: ir.Model) -> None:
    """Remove functions that no node calls any more, and imports of domains without a node."""
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass(process_functions=False)(model)


def require_opset(model: ir.Model, version: int) -> None:
    """Raise the standard opset, and the matching IR version, to what new operators need.

    From opset 21, which tracing emits, to opset 24, operators of a trace only gain element types.
    """
    imports = model.graph.opset_imports
    imports[""] = max(imports.get("", 0), version)
    model.ir_version = max(model.ir_version or 0, _IR_OF_OPSET_23)
