"""Define the canonical dialect: operators of domain `llmc`, each an ONNX function over standard operators.

`CachedAttention` is the attention of one decoder layer over its KV cache
(Vaswani et al. 2017; grouped queries: Ainslie et al. 2023; softcap: Gemma 2; sinks: GPT-OSS):

    inputs   query (batch, heads, sequence, key_width)
             key (batch, kv_heads, sequence, key_width), value (batch, kv_heads, sequence, value_width)
             past_key (batch, kv_heads, past, key_width), past_value (… value_width)
             attention_mask (batch, total) int64, 1 where a cached or new position is real
             sinks (heads,), only in the variant with `has_sinks`
    outputs  output (batch, sequence, heads, value_width)
             present_key (batch, kv_heads, total, key_width), present_value (… value_width)
    attributes  num_heads, kv_num_heads, scale, softcap (0: none), window (0: unlimited), chunk (0: none)

Positions count the real tokens of a row from 0, wherever its padding lies. A query at position p sees the
keys of real tokens at positions j <= p; with a window w, only those with j > p - w; with chunks of c
positions (Llama 4), only those with j // c = p // c. Softmax is computed in float32. Several nodes may have
the same past, key and value: they are layers that share one cache slot.

`Experts` is a layer of experts (Shazeer et al. 2017) after the router's choice, each a SwiGLU (Shazeer 2020):

    inputs   hidden (tokens, hidden), indices (tokens, k) int64, weights (tokens, k)
             gate_up (experts, 2 inner, hidden), down (experts, hidden, inner)
             gate_up_bias (experts, 2 inner), down_bias (experts, hidden), only in the variant with `biases`
    outputs  output (tokens, hidden)
    attributes  alpha, beta, limit (0: none), interleaved (gate and up alternate; else the gate comes first)

Expert e computes down[e] (g sigmoid(alpha g) (u + beta)) from gate g and up u. The limit clips g from above
and u on both sides. The output is the sum over the chosen experts, weighted by their weights.

The lowered operators of later passes belong to other domains; only backends depend on them.
"""

import numpy as np
import onnx_ir as ir

from llmc.graph.body import Body, declare
from llmc.graph.domains import DIALECT, OPSET

CACHED_ATTENTION = "CachedAttention"
EXPERTS = "Experts"

#: A score that no query can reach, finite so that a row without any visible position stays finite.
MASKED = float(np.finfo(np.float32).min)


def cached_attention(*, sinks: bool) -> ir.Function:
    """Define `CachedAttention`, with or without attention sinks."""
    names = ["query", "key", "value", "past_key", "past_value", "attention_mask"]
    if sinks:
        names.append("sinks")
    inputs = [ir.Value(name=n) for n in names]
    query, key, value, past_key, past_value, mask = inputs[:6]
    b = Body()
    one = b.constant([1])
    present_key = b("Concat", past_key, key, name="present_key", axis=2)
    present_value = b("Concat", past_value, value, name="present_value", axis=2)

    # Grouped queries: (batch, kv_heads, group, sequence, width) against (batch, kv_heads, 1, total, width).
    heads = b("Unsqueeze", b.attribute("kv_num_heads", ir.AttributeType.INT), b.constant([0]))
    group = b(
        "Unsqueeze",
        b(
            "Div",
            b.attribute("num_heads", ir.AttributeType.INT),
            b.attribute("kv_num_heads", ir.AttributeType.INT),
        ),
        b.constant([0]),
    )
    query_shape = b("Shape", query)
    batch = b("Slice", query_shape, b.constant([0]), one)
    tail = b("Slice", query_shape, b.constant([2]), b.constant([4]))
    grouped = b("Reshape", query, b("Concat", batch, heads, group, tail, axis=0))
    axis = b.constant([2])
    keys = b("Transpose", b("Unsqueeze", present_key, axis), perm=[0, 1, 2, 4, 3])
    scale = b("CastLike", b.attribute("scale", ir.AttributeType.FLOAT), query)
    scores = b("Cast", b("MatMul", b("Mul", grouped, scale), keys), to=int(ir.DataType.FLOAT))

    scores = cap(b, scores)
    seen = b("Unsqueeze", visible(b, mask, past_key, present_key), b.constant([1, 2]))
    column = b("Reshape", inputs[6], b("Concat", one, heads, group, one, one, axis=0)) if sinks else None
    scores = b("Where", seen, scores, b.constant(MASKED))
    weights = share(b, scores, b("Shape", present_key, start=2, end=3), column)
    values = b("Unsqueeze", present_value, axis)
    mixed = b("MatMul", b("CastLike", weights, query), values)
    width = b("Shape", present_value, start=3, end=4)
    length = b("Shape", query, start=2, end=3)
    all_heads = b("Unsqueeze", b.attribute("num_heads", ir.AttributeType.INT), b.constant([0]))
    merged = b("Reshape", mixed, b("Concat", batch, all_heads, length, width, axis=0))
    output = b("Transpose", merged, name="output", perm=[0, 2, 1, 3])
    graph = ir.Graph(
        inputs,
        [output, present_key, present_value],
        nodes=b.nodes,
        opset_imports={"": OPSET},
        name=CACHED_ATTENTION,
    )
    integers, floats = ("num_heads", "kv_num_heads", "window", "chunk"), ("scale", "softcap")
    return ir.Function(DIALECT, CACHED_ATTENTION, graph=graph, attributes=declare(integers, floats))


def cap(b: Body, scores: ir.Value) -> ir.Value:
    """Emit the softcap of attention scores, float32, by the function's attribute."""
    softcap = b.attribute("softcap", ir.AttributeType.FLOAT)
    capped = b("Greater", softcap, b.constant(0.0))
    divisor = b("Where", capped, softcap, b.constant(1.0))
    return b("Where", capped, b("Mul", softcap, b("Tanh", b("Div", scores, divisor))), scores)


def share(b: Body, scores: ir.Value, total: ir.Value, sinks: ir.Value | None) -> ir.Value:
    """Emit the weights of attention from its scores, (…, sequence, total) float32.

    Args:
        total: Number of keys, (1,).
        sinks: A score for each head, which takes a share of the weights and has no value; None for none.
    """
    if sinks is None:
        return b("Softmax", scores, axis=-1)
    column = b("Cast", sinks, to=int(ir.DataType.FLOAT))
    lead = b("Slice", b("Shape", scores), b.constant([0]), b.constant([-1]))
    column = b("Expand", column, b("Concat", lead, b.constant([1]), axis=0))
    weights = b("Softmax", b("Concat", scores, column, axis=-1), axis=-1)
    return b("Slice", weights, b.constant([0]), total, b.constant([-1]))


def visible(b: Body, mask: ir.Value, past_key: ir.Value, present_key: ir.Value) -> ir.Value:
    """Emit which keys each query sees, (batch, sequence, total) bool."""
    zero, one, last = b.constant(0), b.constant(1), b.constant([2])
    counts = b("CumSum", mask, one)
    slots = [b("Shape", v, start=2, end=3) for v in (past_key, present_key)]
    positions = b("Sub", counts, one)
    queries = b("Unsqueeze", b("Slice", positions, *slots, b.constant([1])), last)
    keys = b("Unsqueeze", positions, b.constant([1]))
    distance = b("Sub", queries, keys)
    window, chunk = (b.attribute(name, ir.AttributeType.INT) for name in ("window", "chunk"))
    inside = b("Or", b("Equal", window, zero), b("Less", distance, window))
    size = b("Max", chunk, one)
    same = b("Equal", b("Div", queries, size), b("Div", keys, size))
    inside = b("And", inside, b("Or", b("Equal", chunk, zero), same))
    real = b("Greater", b("Unsqueeze", mask, b.constant([1])), zero)
    causal = b("And", b("GreaterOrEqual", distance, zero), real)
    return b("And", causal, inside)


def experts(*, biases: bool) -> ir.Function:
    """Define `Experts`, with or without biases, as dense products over all experts."""
    names = ["hidden", "indices", "weights", "gate_up", "down"]
    if biases:
        names += ["gate_up_bias", "down_bias"]
    inputs = [ir.Value(name=n) for n in names]
    hidden, indices, weights, gate_up, down = inputs[:5]
    b = Body()
    zero, one, two = (b.constant(i) for i in range(3))
    first, second = b.constant([0]), b.constant([1])

    def project(x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        product = b("MatMul", x, b("Transpose", weight, perm=[0, 2, 1]))
        return product if bias is None else b("Add", product, b("Unsqueeze", bias, second))

    both = project(b("Unsqueeze", hidden, first), gate_up, inputs[5] if biases else None)
    inner = b("Squeeze", b("Shape", down, start=2, end=3))
    interleaved = b("Equal", b.attribute("interleaved", ir.AttributeType.INT), one)
    stride = b("Where", interleaved, two, one)
    columns = b("Mul", b("Range", zero, inner, one), stride)
    gate = b("Gather", both, columns, axis=-1)
    up = b("Gather", both, b("Add", columns, b("Where", interleaved, one, inner)), axis=-1)

    limit = b.attribute("limit", ir.AttributeType.FLOAT)
    bound = b("Where", b("Greater", limit, b.constant(0.0)), limit, b.constant(-MASKED))
    bound = b("CastLike", bound, hidden)
    gate = b("Min", gate, bound)
    up = b("Max", b("Min", up, bound), b("Neg", bound))
    alpha = b("CastLike", b.attribute("alpha", ir.AttributeType.FLOAT), hidden)
    beta = b("CastLike", b.attribute("beta", ir.AttributeType.FLOAT), hidden)
    swish = b("Mul", gate, b("Sigmoid", b("Mul", gate, alpha)))
    each = project(b("Mul", swish, b("Add", up, beta)), down, inputs[6] if biases else None)

    last = b.constant([-1])
    every = b("Range", zero, b("Squeeze", b("Shape", down, start=0, end=1)), one)
    chosen = b("CastLike", b("Equal", b("Unsqueeze", indices, last), every), weights)
    shares = b("ReduceSum", b("Mul", chosen, b("Unsqueeze", weights, last)), second, keepdims=0)
    shares = b("Unsqueeze", b("Transpose", shares, perm=[1, 0]), last)
    mixed = b("ReduceSum", b("Mul", b("CastLike", each, weights), shares), first, keepdims=0)
    output = b("CastLike", mixed, hidden, name="output")
    graph = ir.Graph(inputs, [output], nodes=b.nodes, opset_imports={"": OPSET}, name=EXPERTS)
    attributes = declare(("interleaved",), ("alpha", "beta", "limit"))
    return ir.Function(DIALECT, EXPERTS, graph=graph, attributes=attributes)
