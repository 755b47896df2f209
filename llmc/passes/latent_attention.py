"""Cache the latent of multi-head latent attention (DeepSeek-V2, 2024) instead of keys and values of heads.

Keys and values of a head are products of one latent per token, beside a rotated part of the key that is the
same for all heads. `LatentAttention` (`llmc.graph.latent`) caches both as one row per token. It reads the
matrix of keys and values as the checkpoint stores it, so that this matrix is not quantized.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.graph import dialect
from llmc.graph.domains import DIALECT
from llmc.graph.edit import Attribute, Site, add_constant, drop_dead, drop_unused_functions, take_over
from llmc.graph.latent import LATENT_ATTENTION, latent_attention
from llmc.graph.linear import as_linear
from llmc.graph.match import dims_of, find_nodes, made_by, operand, part_of, permutation_of
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal

#: A number of tokens that no step has.
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class LatentAttention:
    name: str = "latent-attention"
    summary: str = "attention to one latent per token, which is cached in place of keys and values of heads"

    def run(self, graph: Graph) -> PassReport:
        nodes = find_nodes(graph.graph, dialect.CACHED_ATTENTION, DIALECT)
        readers = Counter(operand(n, 3) for n in nodes)
        matches: list[tuple[ir.Node, _Latent]] = []
        refusals: list[Refusal] = []
        for node in nodes:
            found = _match(node)
            if isinstance(found, _Latent) and readers[operand(node, 3)] > 1:
                found = ("shared", "several layers read its cache")
            if isinstance(found, _Latent):
                matches.append((node, found))
            elif found is not None:
                refusals.append(Refusal(*found, str(node.name), layer_of(node)))
        if matches:
            _define(graph, [node for node, _ in matches])
            graph.notes.append(
                f"{len(matches)} layers cache one latent per token instead of keys and values of heads; "
                "their matrix of keys and values stays in float"
            )
        applied = [layer_of(node) for node, _ in matches]
        for node, latent in matches:
            _rewrite(graph, node, latent)
        drop_dead(graph.graph)
        drop_unused_functions(graph.model)
        return PassReport(self.name, tuple(applied), tuple(refusals))


def _define(graph: Graph, nodes: Sequence[ir.Node]) -> None:
    """Add the variant of the operator that replaces attention `nodes`."""
    sinks = any(len(n.inputs) > 6 for n in nodes)
    capped = any(n.attributes["softcap"].as_float() for n in nodes)
    function = latent_attention(sinks=sinks, capped=capped)
    graph.model.functions[function.identifier()] = function


@dataclass(frozen=True)
class _Product:
    """Columns `start` to `stop` of each head of `x` W^T, where W is (heads * `width`, latent)."""

    x: ir.Value
    weight: ir.Value
    width: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Latent:
    """One layer's keys and values by the latent that both are products of.

    Args:
        shared: The part of the key that all heads share, (batch, 1, sequence, width).
        shared_first: Whether the shared part precedes the product in a key.
    """

    key: _Product
    value: _Product
    shared: ir.Value
    shared_first: bool

    @property
    def rank(self) -> int:
        return int(str(dims_of(self.key.x)[-1]))

    @property
    def width(self) -> int:
        """The width of a row that is cached: latent and shared part."""
        return self.rank + int(str(dims_of(self.shared)[-1]))

    @property
    def expanded_from(self) -> int:
        """The number of tokens in a step from which keys and values of all heads take less arithmetic.

        For each head and cached row, these take rank x (own + value) products once and width of key and value
        for each token; without them, it is width + rank for each token.
        """
        own, value = (p.stop - p.start for p in (self.key, self.value))
        saved = 2 * self.rank - own - value
        return -(-self.rank * (own + value) // saved) if saved > 0 else _NEVER


def _match(node: ir.Node) -> _Latent | tuple[str, str] | None:
    """Return how keys and values depend on a latent, why that is not used, or None if there is none."""
    heads = node.attributes.get_int("kv_num_heads", 0)
    joined = made_by(operand(node, 1), "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes.get_int("axis", 0) not in (-1, 3):
        return None
    parts = [operand(joined, i) for i in (0, 1)]
    spread = [_before_heads(part, heads) for part in parts]
    if (spread[0] is None) == (spread[1] is None):
        return None
    own = 0 if spread[0] is None else 1
    shared = spread[1 - own]
    key, value = _product(parts[own], heads), _product(operand(node, 2), heads)
    if key is None or value is None or shared is None:
        return "projection", "a head's keys or values are more than a product with a matrix without a bias"
    if key.x is not value.x or dims_of(key.x)[1:2] != [1] or len(dims_of(key.x)) != 4:
        return "projection", "keys and values are not products of the same latent"
    if node.attributes.get_int("num_heads", 0) != heads:
        return "grouped", "several heads share keys and values that are products of a latent"
    latent = _Latent(key, value, shared, own == 1)
    expanded = heads * sum(int(str(dims_of(operand(node, i))[-1])) for i in (1, 2))
    if latent.width % 2:
        return "width", f"latent and shared part have {latent.width} columns, which have no halves"
    if latent.width >= expanded:
        return (
            "width",
            f"the latent has {latent.width} numbers, keys and values of all heads {expanded}",
        )
    return latent


def _before_heads(value: ir.Value, heads: int) -> ir.Value | None:
    """Return what is the same for every head in `value`, (batch, 1, sequence, width); None if nothing is."""
    node = made_by(value, "Expand")
    source = None if node is None else operand(node, 0)
    dims = dims_of(source)
    same = len(dims) == 4 and dims[1] == 1 and heads > 1
    return source if same and [*dims[:1], heads, *dims[2:]] == dims_of(value) else None


def _product(value: ir.Value, heads: int) -> _Product | None:
    """Return which product the columns of `value`, (batch, heads, sequence, width), are."""
    width = dims_of(value)[-1]
    source, axis, start, stop, step = part_of(value) or (value, 3, 0, width, 1)
    turned = made_by(source, "Transpose")
    if turned is None or permutation_of(turned) != [0, 2, 1, 3] or axis != 3 or step != 1:
        return None
    split = made_by(turned.inputs[0], "Reshape")
    maker = None if split is None else operand(split, 0).producer()
    linear = None if maker is None else as_linear(maker)
    per_head = dims_of(source)[-1]
    if linear is None or not linear.transposed or not isinstance(per_head, int) or not isinstance(stop, int):
        return None
    if linear.out_features != heads * per_head or dims_of(source)[1] != heads:
        return None
    return _Product(linear.activation, linear.weight, per_head, start, stop)


@dataclass(frozen=True)
class _Layer:
    """Emits the nodes of one layer; all its new values have the type of the query."""

    site: Site
    node: ir.Node

    def emit(
        self, op: str, inputs: list[ir.Value], what: str, shape: list[int | str], **attributes: Attribute
    ) -> ir.Value:
        name, dtype = f"{self.node.name}/{what}", operand(self.node, 0).dtype
        node = self.site.emit(op, inputs, name, attributes=attributes, shape=shape, dtype=dtype)
        return node.outputs[0]

    def columns(self, value: ir.Value, what: str, axis: int, start: int, stop: int) -> ir.Value:
        """Return entries `start` to `stop` along an axis of `value`; `value` itself if these are all."""
        dims = dims_of(value)
        if [start, stop] == [0, dims[axis]]:
            return value
        bounds = [
            add_constant(self.site.graph, np.array([n], np.int64), "bound") for n in (start, stop, axis)
        ]
        return self.emit("Slice", [value, *bounds], what, [*dims[:axis], stop - start, *dims[axis + 1 :]])

    def matrices(self, product: _Product, what: str) -> ir.Value:
        """Return the rows of a product's weight for each head, (heads, columns, latent)."""
        rows, rank = (int(str(n)) for n in dims_of(product.weight))
        sizes = [rows // product.width, product.width, rank]
        shape = add_constant(self.site.graph, np.array(sizes, np.int64), "shape")
        apart = self.emit("Reshape", [product.weight, shape], f"{what}/heads", list(sizes))
        return self.columns(apart, f"{what}/matrix", 1, product.start, product.stop)


def _rewrite(graph: Graph, node: ir.Node, latent: _Latent) -> None:
    """Replace `node` by attention to rows of latent and shared part."""
    layer, query = _Layer(Site(graph.graph, node), node), operand(node, 0)
    batch, _, sequence, width = dims_of(query)
    half, shared = latent.width // 2, latent.width - latent.rank
    cut = shared if latent.shared_first else int(str(width)) - shared
    parts = _joined(query, cut) or [
        layer.columns(query, f"query_{i}", 3, *bounds)
        for i, bounds in enumerate(((0, cut), (cut, int(str(width)))))
    ]
    rotated, own = parts if latent.shared_first else parts[::-1]
    row = [latent.key.x, latent.shared]
    rows = layer.emit("Concat", row, "rows", [batch, 1, sequence, latent.width], axis=-1)
    halves = [layer.columns(rows, f"half_{i}", 3, i * half, (i + 1) * half) for i in (0, 1)]
    matrices = [layer.matrices(latent.key, "keys"), layer.matrices(latent.value, "values")]
    kept = {n: node.attributes[n] for n in ("scale", "softcap", "window", "chunk")}
    attention = layer.site.emit(
        LATENT_ATTENTION,
        [own, rotated, *matrices, *halves, *node.inputs[3:]],
        f"{node.name}/latent",
        domain=DIALECT,
        attributes={"expanded_from": latent.expanded_from, **kept},
        outputs=3,
    )
    take_over(node.outputs[0], attention.outputs[0])
    _narrow_cache(graph, node, attention, half)


def _joined(query: ir.Value, cut: int) -> list[ir.Value] | None:
    """Return the two values that `query` joins at column `cut`, if it does."""
    node = made_by(query, "Concat")
    if node is None or len(node.inputs) != 2 or node.attributes.get_int("axis", 0) not in (-1, 3):
        return None
    parts = [operand(node, i) for i in (0, 1)]
    return parts if dims_of(parts[0])[-1:] == [cut] else None


def _narrow_cache(graph: Graph, old: ir.Node, new: ir.Node, half: int) -> None:
    """Let the cache slot of `old` have the halves of one row for all heads, which `new` extends."""
    for past in (operand(old, 3), operand(old, 4)):
        past.shape = ir.Shape([*dims_of(past)[:1], 1, dims_of(past)[2], half])
    for before, after in zip(old.outputs[1:], new.outputs[1:], strict=True):
        take_over(before, after)
        after.shape = ir.Shape([*dims_of(after)[:1], 1, dims_of(after)[2], half])
    name = operand(old, 3).name
    change = {"kv_heads": 1, "key_width": half, "value_width": half}
    graph.cache = tuple(s.model_copy(update=change) if s.past_key == name else s for s in graph.cache)


PASS = LatentAttention()
