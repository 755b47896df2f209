"""Tabulate values that depend only on positions, such as cosines and sines of rotary embeddings.

No kind of rotary embedding is known here: the graph's own operators are run for every position. If a
condition on the whole step selects one of two sets of values, such as its largest position compared with the
length of the original training, the table has the rows of both sets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.graph.match import constant_of
from llmc.graph.weights import LazyWeight
from llmc.runtime.libraries import load_onnxruntime

#: Number of positions that one run computes.
_CHUNK = 4096
#: Types that are computed in float32 here, so that a table keeps all digits.
_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
#: Number of positions in the check that a row does not depend on the other positions of a step.
_PROBE = 64

#: Values of a graph that are assumed to be constant.
Fixed = Mapping[ir.Value, bool]


@dataclass(frozen=True)
class NoTable:
    """The code and the reason of a refusal, for a value without a table."""

    code: str
    reason: str


@dataclass(frozen=True)
class Table:
    """The values by position.

    Args:
        rows: (switch + length, width) float32.
        switch: Steps whose largest position is below it read row `position`, all others read row
            `switch + position`; 0 if there is one set of values.
    """

    rows: Array
    switch: int = 0


@dataclass
class PositionTables:
    """The tables of values by position, each computed once for any number of layers.

    Args:
        graph: The graph to tabulate.
        length: Number of positions, 0 to length - 1.
    """

    graph: ir.Graph
    length: int
    _keys: dict[ir.Value, int] = field(default_factory=dict)
    _numbers: dict[object, int] = field(default_factory=dict)
    _tables: dict[int, Table | NoTable] = field(default_factory=dict)

    def table(self, value: ir.Value, width: int) -> Table | NoTable:
        """Return the table of `value`, which has `width` elements per batch row and position."""
        key = self._key(value)
        if key not in self._tables:
            self._tables[key] = self._compute(value, width)
        table = self._tables[key]
        if not isinstance(table, NoTable) and table.rows.shape[1] != width:
            reason = f"{value.name} has {table.rows.shape[1]} elements per position, not {width}"
            return NoTable("rotary-shape", reason)
        return table

    def _key(self, value: ir.Value) -> int:
        """Return a key that is equal for values computed in the same way from the same leaves."""
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

    def _compute(self, value: ir.Value, width: int) -> Table | NoTable:
        nodes = self._ancestors(value)
        if isinstance(nodes, NoTable):
            return nodes
        conditions = _conditions(nodes)
        if len({self._key(c) for c in conditions}) != 1:
            return self._whole(value, width, {})
        at = self._switch(conditions[0])
        if isinstance(at, NoTable):
            return at
        if at in (0, self.length):
            return self._whole(value, width, dict.fromkeys(conditions, at == 0))
        below, beyond = (self._whole(value, width, dict.fromkeys(conditions, c)) for c in (False, True))
        if isinstance(below, NoTable) or isinstance(beyond, NoTable):
            return below if isinstance(below, NoTable) else beyond
        table = Table(np.concatenate([below.rows[:at], beyond.rows]), at)
        return table if self._agrees(value, table) else _depends_on_others(value)

    def _switch(self, condition: ir.Value) -> int | NoTable:
        """Find the lowest position at which `condition` holds; `length` if it holds at none."""
        nodes = self._ancestors(condition)
        if isinstance(nodes, NoTable):
            return nodes
        run = _session(condition, nodes, self.graph, {})

        def holds(position: int) -> bool:
            return bool(run(np.array([[position]], np.int64)).reshape(()))

        low, high = 0, self.length
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle + 1, high)
        probes = np.random.default_rng(0).integers(0, self.length, _PROBE).tolist()
        if any(holds(position) != (position >= low) for position in probes):
            return NoTable("rotary-order", f"{condition.name} holds at some positions but not beyond them")
        return low

    def _agrees(self, value: ir.Value, table: Table) -> bool:
        """Return whether the graph itself gives the rows of `table` on both sides of its switch."""
        nodes = self._ancestors(value)
        if isinstance(nodes, NoTable):
            return False
        run, at = _session(value, nodes, self.graph, {}), table.switch
        random = np.random.default_rng(0)
        below = np.append(random.integers(0, at, _PROBE - 1), at - 1)
        beyond = np.append(random.integers(0, self.length, _PROBE - 1), at)
        return np.array_equal(run(below[None]).reshape(_PROBE, -1), table.rows[below]) and np.array_equal(
            run(beyond[None]).reshape(_PROBE, -1), table.rows[at + beyond]
        )

    def _whole(self, value: ir.Value, width: int, fixed: Fixed) -> Table | NoTable:
        """Compute the table of `value` with `fixed` as constants, rows (length, width)."""
        nodes = self._ancestors(value, fixed)
        if isinstance(nodes, NoTable):
            return nodes
        session = _session(value, nodes, self.graph, fixed)

        def run(positions: Array) -> Array | None:
            result = session(positions)
            return result.reshape(-1, width) if result.size == positions.size * width else None

        table = np.empty((self.length, width), np.float32)
        for start in range(0, self.length, _CHUNK):
            positions = np.arange(start, min(start + _CHUNK, self.length), dtype=np.int64)
            rows = run(positions[None])
            if rows is None:
                return NoTable("rotary-shape", f"{value.name} does not have {width} elements per position")
            table[start : start + len(rows)] = rows
        random = np.random.default_rng(0)
        few = np.arange(min(8, self.length), dtype=np.int64)
        for probe in (few[None], random.integers(0, self.length, (2, _PROBE), dtype=np.int64)):
            rows = run(probe)
            if rows is None or not np.array_equal(rows, table[probe.reshape(-1)]):
                return _depends_on_others(value)
        return Table(table)

    def _ancestors(self, value: ir.Value, fixed: Fixed | None = None) -> list[ir.Node] | NoTable:
        """List the nodes that compute `value` with `fixed` as constants, in graph order."""
        ancestors: set[ir.Node] = set()
        pending = [value]
        while pending:
            current = pending.pop()
            if fixed is not None and current in fixed:
                continue
            node = current.producer()
            if node is not None:
                if node not in ancestors:
                    ancestors.add(node)
                    pending.extend(v for v in node.inputs if v is not None and not _counts_rows(node))
            elif isinstance(current.const_value, LazyWeight):
                return NoTable("rotary-weights", f"{value.name} is computed from weight {current.name}")
            elif constant_of(current) is None and current.name != "position_ids":
                reason = f"{value.name} depends on {current.name}, not only on positions"
                return NoTable("rotary-positions", reason)
        if not ancestors or not any(_reads_positions(node) for node in ancestors):
            return NoTable("rotary-positions", f"{value.name} does not depend on position_ids")
        return _in_order(ancestors)


def _depends_on_others(value: ir.Value) -> NoTable:
    return NoTable("rotary-order", f"{value.name} at one position depends on the other positions of the step")


def _conditions(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """List the computed conditions of one element that select one of two values."""
    conditions = [n.inputs[0] for n in nodes if n.op_type == "Where"]
    return [
        c
        for c in dict.fromkeys(conditions)
        if c is not None
        and c.producer() in set(nodes)
        and c.shape is not None
        and all(d == 1 for d in c.shape)
    ]


def _session(
    value: ir.Value, nodes: Sequence[ir.Node], graph: ir.Graph, fixed: Fixed
) -> Callable[[Array], Array]:
    """Return a function that computes `value` from positions (batch, sequence) int64."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(_extract(value, nodes, graph, fixed)).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(positions: Array) -> Array:
        result: Array = session.run(None, {"position_ids": positions})[0]
        return result

    return run


def _counts_rows(node: ir.Node) -> bool:
    """Return whether a node computes the batch size, as the first dimension of an input of the graph.

    Every input of the graph has this dimension, including `position_ids`.
    """
    source = node.inputs[0] if node.op_type == "Shape" else None
    start, end = (node.attributes.get_int(name, 0) for name in ("start", "end"))
    return source is not None and source.is_graph_input() and (start, end) == (0, 1)


def _reads_positions(node: ir.Node) -> bool:
    return any(v is not None and v.producer() is None and v.name == "position_ids" for v in node.inputs)


def _in_order(nodes: set[ir.Node]) -> list[ir.Node]:
    """Sort `nodes` so that each follows the nodes that it reads from."""
    done: dict[ir.Node, None] = {}
    pending = sorted(nodes, key=lambda n: str(n.name))
    while pending:
        node = pending[-1]
        makers = (v.producer() for v in node.inputs if v is not None)
        missing = [m for m in makers if m in nodes and m not in done]
        if node in done or not missing:
            pending.pop()
            done.setdefault(node)
        else:
            pending.extend(missing)
    return list(done)


def _extract(value: ir.Value, nodes: Sequence[ir.Node], graph: ir.Graph, fixed: Fixed) -> ir.Model:
    """Build a model of copies of `nodes`, from position_ids (batch, sequence) to `value`, in float32."""
    positions = ir.val("position_ids", ir.DataType.INT64, ["batch", "sequence"])
    copies: dict[ir.Value, ir.Value] = {}
    constants: list[ir.Value] = []

    def copy_of(source: ir.Value | None) -> ir.Value | None:
        if source is None or source in copies:
            return None if source is None else copies[source]
        if source.name == "position_ids":
            copies[source] = positions
        else:
            data = None if source.const_value is None else _widen(source.const_value)
            if source in fixed:
                data = ir.tensor(np.full([1] * len(source.shape or ()), fixed[source]), name=source.name)
            kind = source.type if data is None else ir.TensorType(data.dtype)
            copies[source] = ir.Value(name=source.name, shape=source.shape, type=kind, const_value=data)
            constants.append(copies[source])
        return copies[source]

    copied = []
    for node in nodes:
        inputs = [positions] if _counts_rows(node) else [copy_of(v) for v in node.inputs]
        outputs = [ir.Value(name=o.name) for o in node.outputs]
        copies.update(zip(node.outputs, outputs, strict=True))
        attributes = [_widen_attribute(a) for a in node.attributes.values()]
        copied.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs))
    copied.append(ir.node("Identity", [copies[value]]))
    result = copied[-1].outputs[0]
    result.name, result.shape = "rows", value.shape
    result.dtype = value.dtype if value.dtype is ir.DataType.BOOL else ir.DataType.FLOAT
    extracted = ir.Graph(
        [positions],
        [result],
        nodes=copied,
        initializers=constants,
        opset_imports=dict(graph.opset_imports),
        name="table",
    )
    return ir.Model(extracted, ir_version=10)


def _widen(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return `tensor` in float32 if it is narrower."""
    if tensor.dtype not in _NARROW:
        return tensor
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen_attribute(attribute: ir.Attr) -> ir.Attr:
    """Widen a constant's value, or the type to which a cast converts."""
    if attribute.type is ir.AttributeType.TENSOR:
        return ir.AttrTensor(attribute.name, _widen(attribute.as_tensor()))
    if attribute.name == "to" and attribute.as_int() in _NARROW:
        return ir.AttrInt64("to", int(ir.DataType.FLOAT))
    return attribute
