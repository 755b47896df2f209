"""Define `LatentAttention`: keys and values of all heads are products of one row per token, which is cached.

In multi-head latent attention (DeepSeek-V2, 2024), keys and values of each head are products of a latent c
per token; a rotated part r of the key is the same for all heads:

    inputs   query (batch, heads, sequence, own), rotated (batch, heads, sequence, shared)
             keys (heads, own, latent), values (heads, value_width, latent): matrices K and V of each head
             first, second (batch, 1, sequence, width / 2): the halves of the new rows (c, r)
             past_first, past_second (batch, 1, past, width / 2)
             attention_mask (batch, total) int64, 1 where a cached or new position is real
             sinks (heads,), only in the variant with `has_sinks`
    outputs  output (batch, sequence, heads, value_width)
             present_first, present_second (batch, 1, total, width / 2)
    attributes  scale, softcap (0: none), window (0: unlimited), chunk (0: none), expanded_from

The key of a head is (K c, r), its query (query, rotated), its value V c. Which rows a query sees, and how
scores become weights, is that of `CachedAttention`. A row is cached in two halves, since runtimes cache two
tensors of the same shape in a layer: together they have each number once.

A step of at least `expanded_from` tokens computes keys and values of all rows. A shorter one moves the
products instead, K to the query and V to the result, so that a cached row is read as it is, once for all
heads. Both give the same numbers; the latter needs more products for each pair of query and row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from llmc.graph.body import Body, declare
from llmc.graph.dialect import MASKED, cap, share, visible
from llmc.graph.domains import DIALECT, OPSET

LATENT_ATTENTION = "LatentAttention"


@dataclass(frozen=True)
class _Step:
    """The values that both ways of computing read.

    Args:
        parts: Query and rotated, scaled.
        matrices: Keys and values.
        halves: Cached and new rows.
        bias: 0 where a query sees a row, (batch, 1, sequence, total) float32.
        sinks: Scores (1, heads, 1, 1) without a value; None for none.
        capped: Whether a softcap limits scores.
    """

    parts: tuple[ir.Value, ir.Value]
    matrices: tuple[ir.Value, ir.Value]
    halves: tuple[ir.Value, ir.Value]
    bias: ir.Value
    sinks: ir.Value | None
    capped: bool

    def weights(self, b: Body, scores: ir.Value) -> ir.Value:
        """Emit the weights of attention from scores (batch, heads, sequence, total)."""
        scores = b("Cast", scores, to=int(ir.DataType.FLOAT))
        scores = b("Add", cap(b, scores) if self.capped else scores, self.bias)
        total = b("Shape", self.halves[0], start=2, end=3)
        return b("CastLike", share(b, scores, total, self.sinks), self.parts[0])


def latent_attention(*, sinks: bool, capped: bool) -> ir.Function:
    """Define `LatentAttention`, with or without attention sinks and a softcap."""
    names = ["query", "rotated", "keys", "values", "first", "second", "past_first", "past_second"]
    names += ["attention_mask", *(["sinks"] if sinks else [])]
    inputs = [ir.Value(name=n) for n in names]
    query, rotated, keys, values, first, second, *pasts, mask = inputs[:9]
    b = Body()
    presents = (
        b("Concat", pasts[0], first, name="present_first", axis=2),
        b("Concat", pasts[1], second, name="present_second", axis=2),
    )
    scale = b("CastLike", b.attribute("scale", ir.AttributeType.FLOAT), query)
    seen = b("Unsqueeze", visible(b, mask, pasts[0], presents[0]), b.constant([1]))
    column = b("Reshape", inputs[9], b.constant([1, -1, 1, 1])) if sinks else None
    step = _Step(
        (b("Mul", query, scale), b("Mul", rotated, scale)),
        (keys, values),
        presents,
        b("Where", seen, b.constant(0.0), b.constant(MASKED)),
        column,
        capped,
    )
    length = b("Squeeze", b("Shape", query, start=2, end=3))
    many = b("Not", b("Less", length, b.attribute("expanded_from", ir.AttributeType.INT)))
    branches = [
        ir.AttrGraph("then_branch", _expanded(step)),
        ir.AttrGraph("else_branch", _moved(step)),
    ]
    mixed = b("If", many, attributes=branches)
    output = b("Transpose", mixed, name="output", perm=[0, 2, 1, 3])
    graph = ir.Graph(
        inputs, [output, *presents], nodes=b.nodes, opset_imports={"": OPSET}, name=LATENT_ATTENTION
    )
    attributes = declare(("window", "chunk", "expanded_from"), ("scale", "softcap"))
    return ir.Function(DIALECT, LATENT_ATTENTION, graph=graph, attributes=attributes)


def _branch(b: Body, output: ir.Value) -> ir.Graph:
    return ir.Graph([], [output], nodes=b.nodes, name=str(output.name))


def _expanded(step: _Step) -> ir.Graph:
    """Emit attention over the keys and values of each head, (batch, heads, sequence, value_width)."""
    b = Body("expanded")
    query, rotated = step.parts
    keys, values = step.matrices
    zero, last = b.constant([0]), b.constant([-1])
    rows = b("Concat", *step.halves, axis=-1)
    rank = b("Shape", keys, start=2, end=3)
    latent = b("Slice", rows, zero, rank, last)
    shared = b("Slice", rows, rank, b("Shape", rows, start=3, end=4), last)
    own, value = (b("MatMul", latent, b("Transpose", m, perm=[0, 2, 1])) for m in (keys, values))
    spread = b("Concat", b("Shape", own, start=0, end=3), b("Shape", shared, start=3, end=4), axis=0)
    key = b("Concat", own, b("Expand", shared, spread), axis=-1)
    whole = b("Concat", query, rotated, axis=-1)
    weights = step.weights(b, b("MatMul", whole, b("Transpose", key, perm=[0, 1, 3, 2])))
    return _branch(b, b("MatMul", weights, value, name="expanded_result"))


def _moved(step: _Step) -> ir.Graph:
    """Emit attention over the cached rows; all heads are rows of one product."""
    b = Body("moved")
    query, rotated = step.parts
    keys, values = step.matrices
    zero, one, last = b.constant([0]), b.constant([1]), b.constant([-1])
    wide = b("Concat", b("MatMul", query, keys), rotated, axis=-1)
    width, middle = b("Shape", wide, start=3, end=4), b("Shape", step.halves[0], start=3, end=4)
    rows = b("Reshape", wide, b("Concat", zero, one, last, width, axis=0))
    sides: Sequence[ir.Value] = (b("Slice", rows, zero, middle, last), b("Slice", rows, middle, width, last))
    products = [
        b("MatMul", side, b("Transpose", half, perm=[0, 1, 3, 2]))
        for side, half in zip(sides, step.halves, strict=True)
    ]
    total = b("Shape", step.halves[0], start=2, end=3)
    lead = b("Shape", query, start=0, end=3)
    weights = step.weights(b, b("Reshape", b("Add", *products), b("Concat", lead, total, axis=0)))
    weights = b("Reshape", weights, b("Concat", zero, one, last, total, axis=0))
    mixed = b("Concat", *(b("MatMul", weights, half) for half in step.halves), axis=-1)
    rank = b("Shape", keys, start=2, end=3)
    latent = b("Reshape", b("Slice", mixed, zero, rank, last), b("Concat", lead, rank, axis=0))
    return _branch(b, b("MatMul", latent, b("Transpose", values, perm=[0, 2, 1]), name="moved_result"))
