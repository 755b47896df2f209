"""Define the dialect's operators whose memory of earlier tokens has a fixed size.

`CausalConv` is a depthwise convolution over time (Gu and Dao 2023), each channel with its own taps:

    inputs   x (batch, channels, sequence), weight (channels, 1, taps), bias (channels,) or absent
             past_state (batch, channels, taps - 1), the last inputs before this step; zeros at the start
             attention_mask (batch, total) int64, 1 where a token is real; its end is this step
    outputs  output (batch, channels, sequence), present_state (batch, channels, taps - 1)
    attributes  channels, silu (1: the output is y sigmoid(y))

`LinearAttention` is a recurrence over a matrix per head (Katharopoulos et al. 2020; with a decay: Mamba 2,
Dao and Gu 2024; with the delta rule: Gated DeltaNet, Yang et al. 2024; with a decay per key channel: Mamba,
Gu and Dao 2023, and Kimi Delta Attention, 2025):

    inputs   query and key (batch, sequence, key_heads key_width), value (batch, sequence, heads value_width)
             past_state (batch, heads, key_width, value_width)
             decay (batch, sequence, heads) or (batch, sequence, heads key_width), a logarithm
             beta (batch, sequence, heads) of the delta rule; absent otherwise
             attention_mask as above
    outputs  output (batch, sequence, heads value_width), present_state
    attributes  heads, key_heads, scale, delta (1: the delta rule)

Token by token, with the outer product x: S = exp(decay) S; S = S + key x beta (value - key S) by the delta
rule, else S = S + key x value; output = scale query S. All of it is float32. Each head of query and key
serves heads / key_heads neighbouring heads.

In both, a token that is not real leaves the state as it is, and its output means nothing. Real tokens of a
step are contiguous, so that a step may be padded on either side.
"""

from collections.abc import Sequence

import onnx_ir as ir

from llmc.graph.body import Body, declare
from llmc.graph.domains import DIALECT, OPSET

CAUSAL_CONV = "CausalConv"
LINEAR_ATTENTION = "LinearAttention"

_INT = ir.AttributeType.INT


def causal_conv() -> ir.Function:
    """Define `CausalConv` by the standard convolution over the past and new inputs."""
    inputs = [ir.Value(name=n) for n in ("x", "weight", "bias", "past_state", "attention_mask")]
    x, weight, bias, past, mask = inputs
    b = Body()
    length = b("Shape", x, start=2, end=3)
    real = real_tokens(b, mask, length)
    masked = b("Mul", x, b("CastLike", b("Unsqueeze", real, b.constant([1])), x))
    whole = b("Concat", past, masked, axis=2)
    group = [ir.RefAttr("group", "channels", _INT)]
    y = b("Conv", whole, weight, bias, attributes=group)
    silu = b("Equal", b.attribute("silu", _INT), b.constant(1))
    output = b("Where", silu, b("Mul", y, b("Sigmoid", y)), y, name="output")

    # The state ends with the last real token: at end + 0 … end + taps - 2 of the past and new inputs.
    numbers = b("Range", b.constant(1), b("Add", b("Squeeze", length), b.constant(1)), b.constant(1))
    end = b("ReduceMax", b("Mul", real, numbers), b.constant([1]))
    width = b("Squeeze", b("Shape", past, start=2, end=3))
    columns = b("Add", end, b("Range", b.constant(0), width, b.constant(1)))
    index = b("Expand", b("Unsqueeze", columns, b.constant([1])), b("Shape", past))
    state = b("GatherElements", whole, index, name="present_state", axis=2)
    return _function(CAUSAL_CONV, inputs, [output, state], b, ("channels", "silu"))


def linear_attention(*, delta: bool) -> ir.Function:
    """Define `LinearAttention`, with or without the delta rule, by a scan over the tokens."""
    names = ("query", "key", "value", "past_state", "decay", "beta", "attention_mask")
    inputs = [ir.Value(name=n) for n in names]
    query, key, value, past, decay, beta, mask = inputs
    b = Body()
    last = b.constant([-1])
    zero = b.constant([0])
    real = b("Greater", real_tokens(b, mask, b("Shape", query, start=1, end=2)), b.constant(0))
    real = b("Unsqueeze", real, b.constant([2, 3]))
    heads, key_heads = (b("Unsqueeze", b.attribute(n, _INT), zero) for n in ("heads", "key_heads"))
    group = b("Div", heads, key_heads)

    def split(x: ir.Value, count: ir.Value) -> ir.Value:
        return b("Reshape", x, b("Concat", b.constant([0, 0]), count, last, axis=0))

    def repeat(x: ir.Value) -> ir.Value:
        shape = b("Shape", split(x, key_heads))
        lead, width = (b("Slice", shape, b.constant([s]), b.constant([e])) for s, e in ((0, 3), (3, 4)))
        several = b("Unsqueeze", split(x, key_heads), b.constant([3]))
        return split(b("Expand", several, b("Concat", lead, group, width, axis=0)), heads)

    each = {
        "query": repeat(query),
        "key": b("Where", real, repeat(key), b.constant(0.0)),
        "value": split(value, heads),
        "decay": b("Where", real, split(decay, heads), b.constant(0.0)),
    }
    if delta:
        each["beta"] = split(beta, heads)
    scanned = [b("Transpose", x, perm=[1, 0, 2, 3]) for x in each.values()]
    node = ir.Node(
        "",
        "Scan",
        [past, *scanned],
        [
            ir.AttrGraph("body", _token(list(each), delta=delta)),
            ir.AttrInt64("num_scan_inputs", len(scanned)),
        ],
        num_outputs=2,
    )
    b.nodes.append(node)
    present, outputs = node.outputs
    present.name, outputs.name = "present_state", "outputs"
    ordered = b("Transpose", outputs, perm=[1, 0, 2, 3])
    scaled = b("Mul", ordered, b.attribute("scale", ir.AttributeType.FLOAT))
    output = b("Reshape", scaled, b.constant([0, 0, -1]), name="output")
    return _function(
        LINEAR_ATTENTION, inputs, [output, present], b, ("heads", "key_heads", "delta"), ("scale",)
    )


def _token(names: Sequence[str], *, delta: bool) -> ir.Graph:
    """Return one step of the recurrence: state (batch, heads, keys, values), the others (batch, heads, …)."""
    inputs = {n: ir.Value(name=f"token_{n}") for n in ("state", *names)}
    b = Body("token")
    column, row = b.constant([-1]), b.constant([-2])
    key = b("Unsqueeze", inputs["key"], column)
    state = b("Mul", inputs["state"], b("Exp", b("Unsqueeze", inputs["decay"], column)))
    new = b("Unsqueeze", inputs["value"], row)
    if delta:
        seen = b("MatMul", b("Unsqueeze", inputs["key"], row), state)
        new = b("Mul", b("Sub", new, seen), b("Unsqueeze", inputs["beta"], column))
    state = b("Add", state, b("Mul", key, new), name="token_next")
    read = b("MatMul", b("Unsqueeze", inputs["query"], row), state)
    output = b("Squeeze", read, row, name="token_output")
    return ir.Graph(list(inputs.values()), [state, output], nodes=b.nodes, name="token")


def real_tokens(b: Body, mask: ir.Value, length: ir.Value) -> ir.Value:
    """Return the mask of this step, (batch, sequence)."""
    total = b("Shape", mask, start=1, end=2)
    return b("Slice", mask, b("Sub", total, length), total, b.constant([1]))


def _function(
    name: str,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    body: Body,
    integers: Sequence[str],
    floats: Sequence[str] = (),
) -> ir.Function:
    graph = ir.Graph(inputs, outputs, nodes=body.nodes, opset_imports={"": OPSET}, name=name)
    return ir.Function(DIALECT, name, graph=graph, attributes=declare(integers, floats))
