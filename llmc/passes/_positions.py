"""Values that depend on positions alone, such as cosines and sines of rotary embeddings, as tables.

Nothing here knows a kind of rotary embedding: the graph's own operators are run for every position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from llmc.graph.model import constant_of
from llmc.graph.weights import Array, LazyWeight

#: Positions that one run computes.
_CHUNK = 4096
#: Types that are computed in float32 here: a table keeps all digits.
_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
#: Positions of the check that order and company do not matter.
_PROBE = 64


@dataclass(frozen=True)
class Declined:
    """Why a value has no table: a refusal's code and reason."""

    code: str
    reason: str


@dataclass
class PositionTables:
    """Tables of values by position, each computed once however many layers spell it out.

    Args:
        graph: The graph.
        length: Number of positions, 0 to length - 1.
    """

    graph: ir.Graph
    length: int
    _keys: dict[ir.Value, int] = field(default_factory=dict)
    _numbers: dict[object, int] = field(default_factory=dict)
    _tables: dict[int, Array | Declined] = field(default_factory=dict)

    def table(self, value: ir.Value, width: int) -> Array | Declined:
        """Rows (length, width) of `value`, which has `width` elements per batch row and position."""
        key = self._key(value)
        if key not in self._tables:
            self._tables[key] = self._compute(value, width)
        table = self._tables[key]
        if not isinstance(table, Declined) and table.shape[1] != width:
            reason = f"{value.name} has {table.shape[1]} elements a position, not {width}"
            return Declined("rotary-shape", reason)
        return table

    def _key(self, value: ir.Value) -> int:
        """Equal for values that are computed alike from the same leaves."""
        order = [value]
        while order:
            current = order[-1]
            node = current.producer()
            inputs = () if node is None else node.inputs
            pending = [v for v in inputs if v is not None and v not in self._keys]
            if current in self._keys or not pending:
                order.pop()
                self._keys.setdefault(current, self._number(current, node))
            else:
                order.extend(pending)
        return self._keys[value]

    def _number(self, value: ir.Value, node: ir.Node | None) -> int:
        identity: object = id(value)
        if node is not None and node.op_type != "Constant":
            inputs = tuple(-1 if v is None else self._keys[v] for v in node.inputs)
            attributes = tuple(sorted((k, str(a.value)) for k, a in node.attributes.items()))
            identity = (node.domain, node.op_type, inputs, attributes, node.outputs.index(value))
        return self._numbers.setdefault(identity, len(self._numbers))

    def _compute(self, value: ir.Value, width: int) -> Array | Declined:
        nodes = self._ancestors(value)
        if isinstance(nodes, Declined):
            return nodes
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        data = ir.to_proto(_extract(value, nodes, self.graph)).SerializeToString()
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

        def run(positions: Array) -> Array | None:
            result: Array = session.run(None, {"position_ids": positions})[0]
            return result.reshape(-1, width) if result.size == positions.size * width else None

        table = np.empty((self.length, width), np.float32)
        for start in range(0, self.length, _CHUNK):
            positions = np.arange(start, min(start + _CHUNK, self.length), dtype=np.int64)
            rows = run(positions[None])
            if rows is None:
                return Declined("rotary-shape", f"{value.name} does not have {width} elements a position")
            table[start : start + len(rows)] = rows
        random = np.random.default_rng(0)
        few = np.arange(min(8, self.length), dtype=np.int64)
        for probe in (few[None], random.integers(0, self.length, (2, _PROBE), dtype=np.int64)):
            rows = run(probe)
            if rows is None or not np.array_equal(rows, table[probe.reshape(-1)]):
                return Declined(
                    "rotary-order", f"{value.name} at one position depends on the other positions of the step"
                )
        return table

    def _ancestors(self, value: ir.Value) -> list[ir.Node] | Declined:
        """The nodes that `value` is computed by, in graph order."""
        seen: set[ir.Node] = set()
        pending = [value]
        while pending:
            current = pending.pop()
            node = current.producer()
            if node is not None:
                if node not in seen:
                    seen.add(node)
                    pending.extend(v for v in node.inputs if v is not None)
            elif isinstance(current.const_value, LazyWeight):
                return Declined("rotary-weights", f"{value.name} is computed from weight {current.name}")
            elif constant_of(current) is None and current.name != "position_ids":
                reason = f"{value.name} depends on {current.name}, not on positions alone"
                return Declined("rotary-positions", reason)
        if not seen or not any(_reads_positions(node) for node in seen):
            return Declined("rotary-positions", f"{value.name} does not depend on position_ids")
        return _in_order(seen)


def _reads_positions(node: ir.Node) -> bool:
    return any(v is not None and v.producer() is None and v.name == "position_ids" for v in node.inputs)


def _in_order(nodes: set[ir.Node]) -> list[ir.Node]:
    """`nodes` such that each stands after those it reads from."""
    done: dict[ir.Node, None] = {}
    pending = sorted(nodes, key=lambda n: str(n.name))
    while pending:
        node = pending[-1]
        makers = (v.producer() for v in node.inputs if v is not None)
        missing = [m for m in makers if m is not None and m not in done]
        if node in done or not missing:
            pending.pop()
            done.setdefault(node)
        else:
            pending.extend(missing)
    return list(done)


def _extract(value: ir.Value, nodes: Sequence[ir.Node], graph: ir.Graph) -> ir.Model:
    """A model of copies of `nodes` alone, from position_ids (batch, sequence) to `value`, in float32."""
    positions = ir.Value(
        name="position_ids", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64)
    )
    copies: dict[ir.Value, ir.Value] = {}
    constants: list[ir.Value] = []

    def copy_of(source: ir.Value | None) -> ir.Value | None:
        if source is None or source in copies:
            return None if source is None else copies[source]
        if source.name == "position_ids":
            copies[source] = positions
        else:
            data = None if source.const_value is None else _widen(source.const_value)
            kind = source.type if data is None else ir.TensorType(data.dtype)
            copies[source] = ir.Value(name=source.name, shape=source.shape, type=kind, const_value=data)
            constants.append(copies[source])
        return copies[source]

    made = []
    for node in nodes:
        inputs = [copy_of(v) for v in node.inputs]
        outputs = [ir.Value(name=o.name) for o in node.outputs]
        copies.update(zip(node.outputs, outputs, strict=True))
        attributes = [_widen_attribute(a) for a in node.attributes.values()]
        made.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs))
    made.append(ir.node("Identity", [copies[value]]))
    result = made[-1].outputs[0]
    result.name, result.shape, result.dtype = "rows", value.shape, ir.DataType.FLOAT
    extracted = ir.Graph(
        [positions],
        [result],
        nodes=made,
        initializers=constants,
        opset_imports=dict(graph.opset_imports),
        name="table",
    )
    return ir.Model(extracted, ir_version=10)


def _widen(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """`tensor` in float32 if it is narrower."""
    if tensor.dtype not in _NARROW:
        return tensor
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen_attribute(attribute: ir.Attr) -> ir.Attr:
    """The same for a constant's value, and for the type that a cast makes."""
    if attribute.type is ir.AttributeType.TENSOR:
        return ir.AttrTensor(attribute.name, _widen(attribute.as_tensor()))
    if attribute.name == "to" and attribute.as_int() in _NARROW:
        return ir.AttrInt64("to", int(ir.DataType.FLOAT))
    return attribute
