"""Changing a graph: new nodes where old ones stood, constants shared by content, dead nodes gone."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.errors import GraphError
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.model import LAYER, Graph
from llmc.graph.weights import LazyWeight, Rows

Array = np.ndarray

#: ONNX releases pair IR version 11 with opset 23 and later (onnx/docs/Versioning.md).
_IR_OF_OPSET_23 = 11


@dataclass(frozen=True)
class Site:
    """Where new nodes go: before `anchor`, in its layer.

    Args:
        graph: The graph.
        anchor: The node that they are inserted before.
    """

    graph: ir.Graph
    anchor: ir.Node

    def emit(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
        like: ir.Value | None = None,
        shape: Sequence[int | str] | None = None,
        dtype: ir.DataType | None = None,
        outputs: int = 1,
    ) -> ir.Node:
        """A new node; its first output is called `name` and has the shape and type of `like`, or those given.

        Further outputs have an empty name, which leaves them out, until `describe` names them.
        """
        made = ir.Node(
            domain,
            op,
            inputs,
            ir.convenience.convert_attributes(dict(attributes or {})),
            num_outputs=outputs,
            name=f"{name}/{op}",
            metadata_props=self._metadata(),
        )
        for output in made.outputs[1:]:
            output.name = ""
        if like is not None:
            shape = shape if shape is not None else list(like.shape or ())  # type: ignore[arg-type]
            dtype = dtype or like.dtype
        describe(made.outputs[0], name, shape or (), dtype)
        self.graph.insert_before(self.anchor, made)
        if domain:
            require_domain(self.graph, domain)
        return made

    def _metadata(self) -> dict[str, str]:
        layer = self.anchor.metadata_props.get(LAYER)
        return {} if layer is None else {LAYER: layer}


def describe(value: ir.Value, name: str, shape: Sequence[int | str], dtype: ir.DataType | None) -> None:
    """Name a value and state its shape and type."""
    value.name = name
    value.shape = ir.Shape(shape)
    if dtype is not None:
        value.type = ir.TensorType(dtype)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Put `new` in the place of `old`: its name, its shape and type, its users and its place as an output."""
    name, old.name = old.name, None
    new.name = name
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def require_domain(graph: ir.Graph, domain: str) -> None:
    """Import version 1 of an operator domain."""
    if domain == MICROSOFT:
        graph.opset_imports.setdefault(domain, 1)


def add_constant(graph: ir.Graph, array: Array, hint: str) -> ir.Value:
    """An initializer with the data of `array`; equal data gives the same initializer.

    Args:
        hint: The beginning of its name, which ends in a digest of the data.
    """
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    digest.update(repr((array.shape, array.dtype.str)).encode())
    name = f"{hint}_{digest.hexdigest()[:12]}"
    known = graph.initializers.get(name)
    return known if known is not None else _register(graph, ir.tensor(array, name=name))


def add_weight(graph: ir.Graph, name: str, rows: Rows) -> ir.Value:
    """An initializer with the values of `rows`; the one there is if `name` is taken by the same ones.

    Raises:
        GraphError: `name` is taken by another value.
    """
    known = graph.initializers.get(name)
    if known is None:
        return _register(graph, LazyWeight.from_rows(name, rows))
    tensor = known.const_value
    if not isinstance(tensor, LazyWeight) or tensor.rows != rows:
        raise GraphError(f"two weights would be called {name}")
    return known


def _register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(tuple(tensor.shape.numpy())),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def drop_dead(graph: ir.Graph) -> int:
    """Remove nodes whose outputs nobody reads, then initializers nobody reads; how many nodes."""
    removed = 0
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
            removed += 1
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    return removed


def drop_unused_dialect(graph: Graph) -> None:
    """Forget the dialect's functions that no node calls any more."""
    used = {node.op_type for node in graph.graph if node.domain == DIALECT}
    for key in [k for k in graph.model.functions if k[0] == DIALECT and k[1] not in used]:
        del graph.model.functions[key]
    if not used:
        graph.graph.opset_imports.pop(DIALECT, None)


def require_opset(model: ir.Model, version: int) -> None:
    """Raise the standard opset, and the IR version that goes with it, to what new operators need.

    From opset 21, which tracing emits, to 24 the operators of a trace gain element types alone.
    """
    imports = model.graph.opset_imports
    imports[""] = max(imports.get("", 0), version)
    model.ir_version = max(model.ir_version or 0, _IR_OF_OPSET_23)
