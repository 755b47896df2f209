"""Fuse rotary position embeddings (Su et al. 2021) into com.microsoft RotaryEmbedding with tables.

    y = x * cos(position) + rotate(x) * sin(position)

`rotate` maps the halves (x1, x2) to (-x2, x1), or does the same to every pair of neighbours (interleaved).
The latter is also how products of complex numbers are traced. If only the first part of a head is rotated,
the rest is passed through. The graph itself computes the tables of cos and sin, (positions, rotated / 2), for
any kind of embedding.

If an embedding has other frequencies when the step's largest position is beyond a length (LongRoPE), its
tables have the rows of both, and its positions are then shifted to the second rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from llmc.graph.domains import MICROSOFT
from llmc.graph.edit import Site, add_constant, drop_dead, take_over
from llmc.graph.match import (
    dims_of,
    input_of,
    is_op,
    last_dim_of,
    made_by,
    only_user,
    operands,
    part_of,
    rank_of,
    scalar_of,
    uncast,
)
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal
from llmc.passes._positions import NoTable, PositionTables, Table

OPERATOR = "RotaryEmbedding"
#: Rows of a table if the model states no largest position, and upper limit.
MOST_POSITIONS = 131072


@dataclass(frozen=True)
class Rotation:
    """A matched embedding.

    Args:
        node: Its last node.
        source: Input, (batch, heads, sequence, width) or (batch, sequence, heads, width).
        output: Result, of the same shape.
        cos: Cosines, broadcast against the rotated part.
        sin: Sines, broadcast likewise.
        rotated: Number of elements of a head that are rotated, from its start.
        interleaved: Whether pairs are neighbours instead of elements of the two halves.
        halved: Whether cos and sin have rotated / 2 elements per position; otherwise each element occurs
            twice.
    """

    node: ir.Node
    source: ir.Value
    output: ir.Value
    cos: ir.Value
    sin: ir.Value
    rotated: int
    interleaved: bool
    halved: bool


@dataclass(frozen=True)
class Rotary:
    name: str = "rotary"
    summary: str = "rotary position embeddings as RotaryEmbedding with tables of cosines and sines"

    def run(self, graph: Graph) -> PassReport:
        def emit(
            site: Site,
            value: ir.Value,
            positions: ir.Value,
            tables: list[ir.Value],
            attributes: dict[str, int],
        ) -> ir.Node:
            name, inputs = f"{value.name}/rotary", [value, positions, *tables]
            return site.emit(OPERATOR, inputs, name, domain=MICROSOFT, attributes=attributes, like=value)

        return replace_rotations(graph, self.name, emit)


#: Emits the operator given the heads, the positions, the tables of cosines and sines, and its attributes.
Emit = Callable[[Site, ir.Value, ir.Value, list[ir.Value], dict[str, int]], ir.Node]


def replace_rotations(graph: Graph, name: str, emit: Emit) -> PassReport:
    """Replace every rotary embedding by one operator; return the report of pass `name`."""
    rotations = [(r, layer_of(node)) for node in graph.graph for r in _match(node)]
    if not rotations:
        return PassReport(name, ())
    length = min(graph.max_length or MOST_POSITIONS, MOST_POSITIONS)
    tables = PositionTables(graph.graph, length)
    applied: list[int | None] = []
    refusals: list[Refusal] = []
    for rotation, layer in rotations:
        declined = _rewrite(graph.graph, rotation, tables, emit)
        if declined is None:
            applied.append(layer)
        else:
            refusals.append(Refusal(declined.code, declined.reason, str(rotation.node.name), layer))
    if applied:
        _limit_length(graph, length)
    drop_dead(graph.graph)
    return PassReport(name, tuple(applied), tuple(refusals))


def _limit_length(graph: Graph, length: int) -> None:
    if graph.max_length != length:
        stated = "no largest position" if graph.max_length is None else f"{graph.max_length} positions"
        graph.notes.append(f"the model states {stated}; the tables of the rotary embedding have {length}")
        graph.max_length = length


def _rewrite(graph: ir.Graph, rotation: Rotation, tables: PositionTables, emit: Emit) -> NoTable | None:
    source, output = rotation.source, rotation.output
    dims, dtype = dims_of(source), output.dtype
    heads_axis = next((a for a in (1, 2) if len(dims) == 4 and isinstance(dims[a], int)), None)
    heads, width = _static(dims, heads_axis), last_dim_of(source)
    if heads is None or width is None or dtype is None or source.dtype != dtype:
        return NoTable(
            "rotary-layout", f"{source.name}, {source.dtype} {dims}, is not heads of known number and width"
        )
    cos, sin = (_half_table(tables, rotation, value) for value in (rotation.cos, rotation.sin))
    if isinstance(cos, NoTable) or isinstance(sin, NoTable):
        return cos if isinstance(cos, NoTable) else sin if isinstance(sin, NoTable) else None
    if cos.switch != sin.switch:
        reason = f"cosines switch at position {cos.switch}, sines at {sin.switch}"
        return NoTable("rotary-order", reason)
    caches = [
        _in_type(graph, add_constant(graph, table.rows, hint), dtype)
        for table, hint in ((cos, "rotary_cos"), (sin, "rotary_sin"))
    ]
    attributes = {"interleaved": int(rotation.interleaved), "num_heads": heads}
    if rotation.rotated != width:
        attributes["rotary_embedding_dim"] = rotation.rotated
    site, name = Site(graph, rotation.node), f"{output.name}/rotary"
    positions = rotary_positions(graph, cos.switch)
    value = source
    if heads_axis == 2:
        flat = add_constant(graph, np.array([0, 0, heads * width], np.int64), "shape")
        shape = [*dims[:2], heads * width]
        value = site.emit("Reshape", [source, flat], f"{name}/flat", shape=shape, dtype=dtype).outputs[0]
    rotated = emit(site, value, positions, caches, attributes).outputs[0]
    if heads_axis == 2:
        split = add_constant(graph, np.array([0, 0, heads, width], np.int64), "shape")
        rotated = site.emit("Reshape", [rotated, split], f"{name}/heads", like=source).outputs[0]
    take_over(output, rotated)
    return None


def rotary_positions(graph: ir.Graph, switch: int) -> ir.Value:
    """Return the rows of a `Table` for the positions of the step, (batch, sequence) int64."""
    positions = next(v for v in graph.inputs if v.name == "position_ids")
    if not switch:
        return positions
    name = f"rotary/positions_{switch}"
    existing = next((n.outputs[0] for n, _ in positions.uses() if n.outputs[0].name == name), None)
    if existing is not None:
        return existing
    site = Site(graph, graph[0])

    def emit(op: str, inputs: list[ir.Value], part: str, dtype: ir.DataType, **attributes: int) -> ir.Value:
        node = site.emit(op, inputs, f"{name}/{part}", attributes=attributes, shape=[], dtype=dtype)
        node.metadata_props.clear()
        return node.outputs[0]

    at, none = (add_constant(graph, np.array(n, np.int64), "switch") for n in (switch, 0))
    reached = emit("GreaterOrEqual", [positions, at], "reached", ir.DataType.BOOL)
    reached.shape = positions.shape
    numbers = emit("Cast", [reached], "numbers", ir.DataType.INT64, to=int(ir.DataType.INT64))
    numbers.shape = positions.shape
    count = emit("ReduceSum", [numbers], "count", ir.DataType.INT64, keepdims=0)  # Max needs cuDNN on CUDA
    beyond = emit("Greater", [count, none], "beyond", ir.DataType.BOOL)
    shift = emit("Where", [beyond, at, none], "shift", ir.DataType.INT64)
    shifted = site.emit("Add", [positions, shift], name, like=positions)
    shifted.metadata_props.clear()
    return shifted.outputs[0]


def _in_type(graph: ir.Graph, table: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Cast the float32 `table` to `dtype`, with one cast that runtimes fold when they load or build.

    The file keeps all digits, so that the graph can be compared with the original in float32.
    """
    if table.dtype is dtype:
        return table
    name = f"{table.name}.{dtype.name.lower()}"
    for node, _ in table.uses():
        if node.name == name:
            return node.outputs[0]
    site = Site(graph, graph[0], metadata={})
    cast = site.emit(
        "Cast", [table], name, attributes={"to": int(dtype)}, like=table, dtype=dtype, node_name=name
    )
    return cast.outputs[0]


def _static(dims: list[int | str], axis: int | None) -> int | None:
    size = None if axis is None else dims[axis]
    return size if isinstance(size, int) else None


def _half_table(tables: PositionTables, rotation: Rotation, value: ir.Value) -> Table | NoTable:
    """Return one column per pair of rotated elements, (positions, rotated / 2) float32."""
    pairs = rotation.rotated // 2
    if rotation.halved:
        return tables.table(value, pairs)
    table = tables.table(value, rotation.rotated)
    if isinstance(table, NoTable):
        return table
    if rotation.interleaved:
        first, second = table.rows[:, 0::2], table.rows[:, 1::2]
    else:
        first, second = table.rows[:, :pairs], table.rows[:, pairs:]
    if not np.array_equal(first, second):
        return NoTable("rotary-halves", f"{value.name} turns the two elements of a pair by different angles")
    return Table(np.ascontiguousarray(first), table.switch)


def _match(node: ir.Node) -> Iterator[Rotation]:
    """Match the embedding that ends in `node`, extended to the whole head and over a cast back."""
    match = _match_sum(node) if is_op(node, "Add") else _match_halves(node) if is_op(node, "Concat") else None
    if match is not None:
        yield _with_cast(_with_rest(match))


def _match_sum(add: ir.Node) -> Rotation | None:
    """Match x * cos + rotate(x) * sin."""
    for one, other in operands(add):
        turned, straight = made_by(one, "Mul"), made_by(other, "Mul")
        if turned is None or straight is None:
            continue
        for candidate, sin in operands(turned):
            rotation = _turned(uncast(candidate))
            if rotation is None:
                continue
            x, interleaved = rotation
            rotated = last_dim_of(x)
            for value, cos in operands(straight):
                if uncast(value) is x and rotated and last_dim_of(cos) == last_dim_of(sin) == rotated:
                    return Rotation(
                        add, x, add.outputs[0], uncast(cos), uncast(sin), rotated, interleaved, False
                    )
    return None


def _turned(value: ir.Value) -> tuple[ir.Value, bool] | None:
    """Return (x, interleaved) if `value` is rotate(x)."""
    joined, interleaved = made_by(value, "Concat"), False
    if (reshape := made_by(value, "Reshape")) is not None:
        joined, interleaved = made_by(input_of(reshape), "Concat"), True
    if joined is None or len(joined.inputs) != 2 or not _joins_last_axis(joined):
        return None
    first, second = (_before_unsqueeze(v) if interleaved else v for v in joined.inputs)
    negated = made_by(first, "Neg")
    if negated is None:
        return None
    pair = _pair(second, input_of(negated), interleaved)
    if pair is None or dims_of(pair) != dims_of(value):
        return None
    return uncast(pair), interleaved


def _pair(first: ir.Value | None, second: ir.Value | None, interleaved: bool) -> ir.Value | None:
    """Return x if `first` and `second` are its halves, or its even and odd elements."""
    low, high = part_of(first), part_of(second)
    if low is None or high is None or low[0] is not high[0]:
        return None
    x, width = low[0], last_dim_of(low[0])
    last = len(dims_of(x)) - 1
    if width is None or width % 2:
        return None
    if interleaved:
        expected = ((last, 0, width, 2), (last, 1, width, 2))
    else:
        expected = ((last, 0, width // 2, 1), (last, width // 2, width, 1))
    return x if (low[1:], high[1:]) == expected else None


def _match_halves(concat: ir.Node) -> Rotation | None:
    """Match (x1 * cos - x2 * sin, x2 * cos + x1 * sin), where cos has half the width of x.

    The two are joined, and x is (x1, x2); or they are stacked, and x1 and x2 are its even and odd elements.
    """
    if len(concat.inputs) != 2 or not _joins_last_axis(concat):
        return None
    stacked = [_before_unsqueeze(v) for v in concat.inputs]
    node, interleaved = concat, None not in stacked
    if interleaved:
        user = only_user(concat.outputs[0])
        if user is None or not is_op(user, "Reshape"):
            return None
        node = user
    minus, plus = (
        made_by(v, op)
        for v, op in zip(stacked if interleaved else concat.inputs, ("Sub", "Add"), strict=True)
    )
    if minus is None or plus is None:
        return None
    cos_product, sin_product = made_by(minus.inputs[0], "Mul"), made_by(minus.inputs[1], "Mul")
    if cos_product is None or sin_product is None:
        return None
    for first, cos in operands(cos_product):
        for second, sin in operands(sin_product):
            one, other = uncast(first), uncast(second)
            x = _neighbours(one, other) if interleaved else _pair(one, other, False)
            if x is None or not _sums(plus, (second, cos), (first, sin)):
                continue
            width, output = last_dim_of(x) or 0, node.outputs[0]
            if last_dim_of(cos) == last_dim_of(sin) == width // 2 and dims_of(output) == dims_of(x):
                return Rotation(node, uncast(x), output, uncast(cos), uncast(sin), width, interleaved, True)
    return None


def _neighbours(first: ir.Value, second: ir.Value) -> ir.Value | None:
    """Return x if `first` and `second` are its even and odd elements: of slices, or of x seen as pairs."""
    x = _pair(first, second, True)
    chosen = [made_by(v, "Gather") for v in (first, second)]
    if x is not None or None in chosen:
        return x
    sources = {node.inputs[0] for node in chosen if node is not None}
    pairs = sources.pop()
    reshape = made_by(pairs, "Reshape")
    if sources or pairs is None or reshape is None or (x := input_of(reshape)) is None:
        return None
    axes = {node.attributes.get_int("axis", 0) % rank_of(pairs) for node in chosen if node is not None}
    numbers = [scalar_of(node.inputs[1]) for node in chosen if node is not None]
    seen, width = [*dims_of(x)[:-1], (last_dim_of(x) or 0) // 2, 2], last_dim_of(x)
    even = width is not None and width % 2 == 0 and dims_of(pairs) == seen
    return x if even and axes == {rank_of(pairs) - 1} and numbers == [0, 1] else None


def _sums(add: ir.Node, one: tuple[ir.Value, ir.Value], other: tuple[ir.Value, ir.Value]) -> bool:
    """Return whether `add` sums the products of two pairs, in any order."""
    products = [made_by(v, "Mul") for v in add.inputs]
    factors = [frozenset(p.inputs) for p in products if p is not None]
    return len(factors) == 2 and set(factors) == {frozenset(one), frozenset(other)}


def _with_rest(rotation: Rotation) -> Rotation:
    """Extend `rotation` to the whole head if its output is joined with the part that is not rotated."""
    part, user = part_of(rotation.source), only_user(rotation.output)
    if part is None or user is None or not is_op(user, "Concat") or not _joins_last_axis(user):
        return rotation
    whole, axis, start, stop, step = part
    width = last_dim_of(whole)
    other = user.inputs[1] if len(user.inputs) == 2 else None
    rest = None if other is None else part_of(uncast(other))
    if user.inputs[0] is not rotation.output or rest is None or rest[0] is not whole:
        return rotation
    if (axis, start, step) != (rank_of(whole) - 1, 0, 1) or rest[1:] != (axis, stop, width, 1):
        return rotation
    return replace(rotation, node=user, source=whole, output=user.outputs[0])


def _with_cast(rotation: Rotation) -> Rotation:
    """Extend `rotation` by the cast back to the type of its source."""
    user = only_user(rotation.output)
    if user is None or not is_op(user, "Cast") or user.outputs[0].dtype != rotation.source.dtype:
        return rotation
    return replace(rotation, node=user, output=user.outputs[0])


def _joins_last_axis(concat: ir.Node) -> bool:
    rank = rank_of(concat.outputs[0])
    return rank > 0 and concat.attributes.get_int("axis", 0) % rank == rank - 1


def _before_unsqueeze(value: ir.Value | None) -> ir.Value | None:
    node = made_by(value, "Unsqueeze")
    return None if node is None else input_of(node)


PASS = Rotary()
