"""Convert a region of a graph to a program, operator by operator."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from llmc.backends.compiled import attention, layout, rotary, states
from llmc.backends.compiled.expressions import BINARY, MOST_PLACES, UNARY, Expression, apply, constant, leaf
from llmc.backends.compiled.layout import REDUCING, REGROUPING
from llmc.backends.compiled.operands import (
    NORMS,
    PARTS,
    Spread,
    codes_of,
    embedding_layout,
    is_static,
    is_turned,
    layout_of,
    space_of,
    spread_of,
    width_of,
)
from llmc.backends.compiled.pack import PackedLayout, PackedWeight
from llmc.backends.compiled.program import (
    LANES,
    Buffer,
    Caches,
    Fields,
    Operation,
    Program,
    RowPlace,
    Space,
    Tensor,
    Variant,
)
from llmc.config import CacheType
from llmc.graph.domains import MICROSOFT
from llmc.graph.edit import add_initializer
from llmc.graph.match import dims_of, input_of, lazy_of, operand, scalar_of
from llmc.graph.weights import LazyWeight, WeightGroup


@dataclass
class RegionBuilder:
    """The builder of a region's program.

    Args:
        inside: Nodes of the region, in order.
        packed: Initializers with packed weights, by the group of the codes; shared by all regions.
        cache: Type in which keys and values are to be stored; the graph's own is still float32.
        layouts: Layouts of the packed weights that the region reads, by name.
    """

    inside: Sequence[ir.Node]
    graph: ir.Graph
    packed: dict[int, ir.Value]
    cache: CacheType
    program: Program = field(default_factory=Program)
    inputs: dict[ir.Value, Tensor] = field(default_factory=dict)
    weights: dict[ir.Value, Tensor] = field(default_factory=dict)
    outputs: dict[ir.Value, Tensor] = field(default_factory=dict)
    pasts: dict[ir.Value, ir.Value] = field(default_factory=dict)
    layouts: dict[str, PackedLayout] = field(default_factory=dict)
    rows_from: ir.Value | None = None
    chosen: ir.Value | None = None
    choice: ir.Value | None = None
    total: ir.Value | None = None
    states: set[ir.Value] = field(default_factory=set)
    _places: dict[ir.Value, RowPlace] = field(default_factory=dict)
    _pending: dict[ir.Value, Expression] = field(default_factory=dict)
    _spread: dict[tuple[RowPlace, Spread], RowPlace] = field(default_factory=dict)
    _quantized: dict[tuple[RowPlace, int, int], RowPlace] = field(default_factory=dict)

    def build(self) -> None:
        """Fill the program, and number the tensors of the operator."""
        nodes = set(self.inside)
        for node in self.inside:
            for value in node.outputs:
                if value.is_graph_output() or any(user not in nodes for user, _ in value.uses()):
                    self.outputs[value] = Tensor()
        for node in self.inside:
            _LOWER[node.domain, node.op_type](self, node)
        for value in self.outputs:
            if value in self._pending:
                self.place(value)
            home = self._places[value].home if value in self._places else None
            if home is not None and home is not self.outputs[value]:
                self._copy(value)
        for index, tensor in enumerate(
            [*self.inputs.values(), *self.weights.values(), *self.outputs.values()]
        ):
            tensor.index = index

    # Values

    def input(self, value: ir.Value) -> Tensor:
        """Register a computed value from outside of the region."""
        dims = dims_of(value)
        if self.rows_from is None and (dims[:2] == ["batch", "sequence"] or is_turned(value)):
            self.rows_from = value
        if width_of(value) and space_of(value) == "kLast":
            self.chosen = value
        return self.inputs.setdefault(value, Tensor())

    def state(self, past: ir.Value, present: ir.Value) -> Caches:
        """Register a state of fixed size."""
        self.states.add(present)
        return Caches((self.inputs.setdefault(past, Tensor()), self.outputs[present]))

    def weight(self, value: ir.Value) -> Tensor:
        return self.weights.setdefault(value, Tensor())

    def packed_weight(self, codes: ir.Value, layout: PackedLayout) -> Tensor:
        """Return the packed form of codes and the scales stored with them, shared by all readers."""
        lazy = lazy_of(codes)
        key = id(lazy.group)
        if key not in self.packed:
            group = WeightGroup(lazy.sources, PackedWeight(lazy.group, layout))
            name = str(codes.name).removesuffix(".codes") + ".packed"
            shape = (layout.groups, layout.group_bytes)
            tensor = LazyWeight(name=name, dtype=ir.DataType.UINT8, shape=shape, group=group, key="packed")
            self.packed[key] = add_initializer(self.graph, tensor)
        self.layouts[str(self.packed[key].name)] = layout
        return self.weight(self.packed[key])

    def make(self, value: ir.Value, width: int, space: Space) -> RowPlace:
        """Assign the place to write `value` to: its output tensor, or a new buffer."""
        if value in self.outputs and not is_turned(value):
            place = RowPlace(self.outputs[value], width, 0, width, space)
        else:
            stride = -(-width // LANES) * LANES
            place = RowPlace(Buffer(stride), stride, 0, width, space)
        self._places[value] = place
        return place

    def temporary(self, width: int, space: Space) -> RowPlace:
        stride = -(-width // LANES) * LANES
        return RowPlace(Buffer(stride), stride, 0, width, space)

    def place(self, value: ir.Value) -> RowPlace:
        """Return the rows of an activation; computes them now if they are pending."""
        if value in self._places:
            return self._places[value]
        if value in self._pending:
            expression = self._pending.pop(value)
            out = self.make(value, expression.width, expression.space)
            self._elementwise(expression, out)
            return out
        width, space = width_of(value), space_of(value)
        if is_turned(value):
            place = self.temporary(width, space)
            fields: Fields = {"row": f"turn_in_row<{width}>", "weight": self.input(value), "out": place}
            self.program.operations.append(Operation("row", space, fields))
        else:
            place = RowPlace(self.input(value), width, 0, width, space)
        self._places[value] = place
        return place

    def alias(self, value: ir.Value, place: RowPlace) -> None:
        """Let `value` be rows that another value has already."""
        self._places[value] = place

    def spread(self, source: RowPlace, spread: Spread) -> RowPlace:
        """Return wider rows that `source` fills."""
        key = (source, spread)
        if key not in self._spread:
            sizes = (spread.outer, spread.copies, spread.inner)
            out = self.temporary(math.prod(sizes), source.space)
            fields: Fields = {"row": f"spread_row<{', '.join(map(str, sizes))}>", "a": source, "out": out}
            self.program.operations.append(Operation("row", source.space, fields))
            self._spread[key] = out
        return self._spread[key]

    def _expression(self, value: ir.Value, output: ir.Value) -> Expression:
        """Return an operand of an element-wise operator."""
        width, space = width_of(output), space_of(output)
        number = scalar_of(value)
        if number is not None:
            return constant(number, width, space)
        spread = spread_of(value, output)
        if spread is not None and spread.copies > 1:
            same = (
                RowPlace(self.weight(value), 0, 0, width // spread.copies, space)
                if is_static(value)
                else None
            )
            return leaf(self.spread(same or self.place(value), spread), width, space)
        if is_static(value):
            return leaf(self.weight(value), width, space)
        if value in self._pending:
            users = {user for user, _ in value.uses()}
            if len(users) == 1 and value not in self.outputs:
                return self._pending[value]
        return leaf(self.place(value), width, space)

    # Operators

    def elementwise(self, node: ir.Node) -> None:
        output = node.outputs[0]
        width, space = width_of(output), space_of(output)
        unary = UNARY.get((node.domain, node.op_type))
        pattern = BINARY[node.op_type] if unary is None else unary(node)
        values = [operand(node, i) for i in range(2 if unary is None else 1)]
        arguments = [self._expression(value, output) for value in values]
        joined = apply(pattern, *arguments)
        if len(joined.places) > MOST_PLACES or len(joined.vectors) > 2:
            settled = [
                leaf(self.place(v), width, space) if v in self._pending else a
                for v, a in zip(values, arguments, strict=True)
            ]
            joined = apply(pattern, *settled)
        self._pending[output] = joined

    def _elementwise(self, expression: Expression, out: RowPlace) -> None:
        names: dict[int, str] = {}
        fields: Fields = {"out": out}
        loads, members = [], {"places": iter("abc"), "vectors": iter(("weight", "bias"))}
        for index, item in enumerate(expression.leaves):
            kind = "places" if isinstance(item.source, RowPlace) else "vectors"
            member = next(members[kind])
            fields[member] = item.source
            names[index] = member
            loads.append(
                f"const float* {member} = run.at(op.{member}, row);"
                if kind == "places"
                else f"const float* {member} = run.tensor<const float>(op.{member});"
            )
        whole = expression.text.format(*[f"load({names[i]} + i)" for i in range(len(names))])
        left = out.width % LANES
        code = " ".join(loads) + (
            f" float* out = run.at(op.out, row); int i = 0; for (; i < {out.width - left}; i += kLanes) "
            f"store(out + i, {whole});"
        )
        if left:
            part = expression.text.format(*[f"load_first({names[i]} + i, {left})" for i in range(len(names))])
            code += f" store_first(out + i, {part}, {left});"
        name = f"elementwise_{hashlib.sha256(code.encode()).hexdigest()[:8]}"
        self.program.functions[name] = code
        self.program.operations.append(Operation("row", out.space, {"row": name, **fields}))

    def _copy(self, value: ir.Value) -> None:
        source = self._places[value]
        if is_turned(value):
            turn: Fields = {
                "row": f"turn_out_row<{source.width}>",
                "weight": self.outputs[value],
                "a": source,
            }
            self.program.operations.append(Operation("row", source.space, turn))
            return
        out = RowPlace(self.outputs[value], source.width, 0, source.width, source.space)
        fields = {"row": f"copy_row<{source.width}>", "out": out, "a": source}
        self.program.operations.append(Operation("row", source.space, fields))  # type: ignore[arg-type]

    def norm(self, node: ir.Node) -> None:
        centred, skip = NORMS[node.domain, node.op_type]
        vectors = [v for v in node.inputs[2 if skip else 1 :] if v is not None]
        scale = vectors[0]
        bias = input_of(node, 3 if skip else 2) if centred else None
        source = operand(node, 0)
        space = space_of(source)
        a = self.place(source)
        width = int(dims_of(scale)[0])
        fields: Fields = {
            "a": a,
            "weight": self.weight(scale),
            "x": node.attributes.get_float("epsilon", 1e-5),
        }
        if bias is not None:
            fields["bias"] = self.weight(bias)
        if skip:
            fields["b"] = self.place(operand(node, 1))
            total = node.outputs[3] if len(node.outputs) > 3 else None
            used = total is not None and (total.uses() or total.is_graph_output())
            fields["c"] = (
                self.make(total, a.width, space)
                if used and total is not None
                else self.temporary(a.width, space)
            )
        fields["out"] = self.make(node.outputs[0], a.width, space)
        flags = [str(x).lower() for x in (centred, skip)]
        fields["row"] = f"norm_row<{width}, {a.width // width}, {', '.join(flags)}>"
        self.program.operations.append(Operation("row", space, fields))

    def matmul(self, node: ir.Node) -> None:
        layout = layout_of(node)
        source, output = operand(node, 0), node.outputs[0]
        space = space_of(output)
        parts = PARTS[node.attributes["accuracy_level"].as_int()]
        kind = _matmul_type(layout, parts)
        weight = self.packed_weight(operand(node, 1), layout)
        place = self.place(source)
        activation = self._quantize(place, layout, parts)
        common: Fields = {"weight": weight, "n": layout.n, "out": self.make(output, layout.n, space)}
        functions: Fields = {f: f"{kind}::{f}" for f in ("chunks", "chunk", "ahead")}
        exact = (_exact_product(kind, {**common, "a": place}, space),)
        fields: Fields = {**functions, **common, "a": activation}
        self.program.operations.append(
            Operation("chunk", space, fields, f"{kind}::scratch", instead={"products": exact, "exact": exact})
        )

    def _quantize(self, place: RowPlace, layout: PackedLayout, parts: int) -> RowPlace:
        key = (place, layout.block, parts)
        if key not in self._quantized:
            width = parts * layout.blocks * layout.block // 4 + 3 * layout.blocks
            out = self.temporary(width, place.space)
            row = f"quantize_row<{layout.k}, {layout.block}, {parts}, {out.stride}>"
            fields: Fields = {"row": row, "a": place, "out": out}
            instead: dict[Variant, tuple[()]] = {"products": (), "exact": ()}
            self.program.operations.append(Operation("row", place.space, fields, instead=instead))
            self._quantized[key] = out
        return self._quantized[key]

    def embed(self, node: ir.Node) -> None:
        codes = codes_of(node)
        layout = embedding_layout(node)
        kind = _matmul_type(layout, 1)
        fields: Fields = {
            "row": f"embed_row<{kind}>",
            "check": "check_ids",
            "weight": self.packed_weight(codes, layout),
            "lengths": self.input(operand(node, 1)),
            "limit": layout.n,
            "out": self.make(node.outputs[0], layout.k, "kTokens"),
        }
        self.program.operations.append(Operation("row", "kTokens", fields))


def _matmul_type(layout: PackedLayout, parts: int) -> str:
    """Return the C++ type of products with a packed matrix."""
    return f"Matmul<{layout.k}, {layout.block}, {layout.bits}, Zero::k{layout.zero.name.title()}, {parts}>"


def _exact_product(kind: str, fields: Fields, space: Space) -> Operation:
    """Create the product of `kind` with activations in float32."""
    exact = f"Exact<{kind}>"
    functions: Fields = {f: f"{exact}::{f}" for f in ("chunks", "chunk")}
    return Operation("chunk", space, {**functions, **fields}, f"{exact}::scratch")


_LOWER: dict[tuple[str, str], Callable[[RegionBuilder, ir.Node], None]] = {
    (MICROSOFT, "MatMulNBits"): RegionBuilder.matmul,
    (MICROSOFT, "GatherBlockQuantized"): RegionBuilder.embed,
    (MICROSOFT, "GroupQueryAttention"): attention.grouped_query,
    states.CONVOLUTION: states.convolution,
    states.ATTENTION: states.attention,
    ("", "GatherND"): layout.choose_tokens,
    rotary.ROTARY: rotary.rotary,
    ("", "Split"): layout.split,
    ("", "Slice"): layout.slice_features,
    ("", "Gather"): layout.gather,
    ("", "Concat"): layout.concat,
    ("", "Transpose"): layout.regroup,
    ("", "Expand"): layout.expand,
    **{("", op): layout.regroup for op in REGROUPING},
    **{("", op): layout.reduce for op in REDUCING},
    **dict.fromkeys(NORMS, RegionBuilder.norm),
    **dict.fromkeys(UNARY, RegionBuilder.elementwise),
    **{("", op): RegionBuilder.elementwise for op in BINARY},
}
