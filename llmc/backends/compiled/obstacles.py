"""Find out why an operator stays outside of compiled regions."""

from collections.abc import Callable

import onnx_ir as ir

from llmc.backends.compiled import layout, rotary, states
from llmc.backends.compiled.expressions import BINARY, UNARY
from llmc.backends.compiled.layout import REDUCING, REGROUPING
from llmc.backends.compiled.operands import (
    NORMS,
    PARTS,
    codes_of,
    embedding_layout,
    is_static,
    layout_of,
    reads_shared_cache,
    scales_of,
    shift_of,
    space_of,
    spread_of,
    width_of,
)
from llmc.backends.compiled.pack import PackedLayout
from llmc.backends.compiled.program import LANES, MOST_DIMS
from llmc.graph.domains import MICROSOFT
from llmc.graph.match import dims_of, input_of, operand, rank_of, scalar_of
from llmc.graph.model import CHUNK, PackedZero
from llmc.graph.weights import LazyWeight


def obstacle(node: ir.Node) -> str | None:
    """Return the reason why `node` stays with ONNX Runtime; None if a region can contain it."""
    check = _CHECKS.get((node.domain, node.op_type))
    if check is None:
        return "there is no kernel for it"
    if any(o.dtype not in (ir.DataType.FLOAT, None) for o in node.outputs if o.uses() or o.is_graph_output()):
        return "it does not compute in float32"
    if any(rank_of(value) > MOST_DIMS for value in (*node.inputs, *node.outputs)):
        return f"a tensor has more than {MOST_DIMS} dimensions"
    return check(node)


def _check_weights(node: ir.Node, layout: PackedLayout, codes: ir.Value) -> str | None:
    tensors = [value.const_value for value in (codes, *scales_of(node))]
    groups = {id(t.group) if isinstance(t, LazyWeight) else None for t in tensors}
    if None in groups:
        return "its weights are not an initializer"
    if len(groups) > 1:
        return "its scales are not stored with its codes"
    if layout.k % LANES:
        return f"it has {layout.k} input features, but kernels need multiples of {LANES}"
    if layout.bits == 8 and layout.zero is PackedZero.CODE:
        return "8-bit weights have integer zero points"
    return None


def _check_matmul(node: ir.Node) -> str | None:
    if any(v is not None for v in node.inputs[4:]):
        return "it has group indices or a bias of its own"
    if width_of(operand(node, 0)) == 0 or width_of(node.outputs[0]) == 0:
        return "its operand is not one row of features per token"
    if node.attributes.get_int("accuracy_level", 0) not in PARTS:
        return "its activations are not quantized"
    return _check_weights(node, layout_of(node), operand(node, 1))


def _check_embedding(node: ir.Node) -> str | None:
    ids = operand(node, 1)
    if ids.dtype != ir.DataType.INT64 or dims_of(ids) != ["batch", "sequence"]:
        return "its indices are not one per token"
    layout = embedding_layout(node)
    if layout.k == 0:
        return "its rows have no static width"
    return _check_weights(node, layout, codes_of(node))


def _check_norm(node: ir.Node) -> str | None:
    centred, skip = NORMS[node.domain, node.op_type]
    source = operand(node, 0)
    width = width_of(source)
    vectors = [v for v in node.inputs[2 if skip else 1 :] if v is not None]
    limit = 2 if centred else 1
    if (
        not vectors
        or len(vectors) > limit
        or any(v.const_value is None or len(dims_of(v)) != 1 for v in vectors)
    ):
        return "its scale or bias is not a vector of the model"
    features = int(dims_of(vectors[0])[0])
    if width == 0 or features % LANES or width % features or int(dims_of(source)[-1]) != features:
        return f"it normalizes {features} features of {width}, but kernels need multiples of {LANES}"
    if skip and (dims_of(operand(node, 1)) != dims_of(source) or width != features):
        return "its summand has another shape"
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:3]):
        return "its mean or inverse deviation is read"
    return None


def _check_elementwise(node: ir.Node) -> str | None:
    output = node.outputs[0]
    if width_of(output) == 0:
        return "its rows have no static number of features"
    binary = node.op_type in BINARY and not node.domain
    numbers = [v for v in node.inputs[0 if binary else 1 :] if v is not None and scalar_of(v) is not None]
    values = [v for v in node.inputs if v is not None and v not in numbers]
    if any(spread_of(value, output) is None for value in values):
        return "an operand has another shape"
    if len(values) > (2 if binary else 1):
        return "its limits are not numbers of the model"
    return None if any(width_of(value) for value in values) else "it reads no activation"


def _check_choice(node: ir.Node) -> str | None:
    source, index = operand(node, 0), operand(node, 1)
    width = width_of(source)
    if width == 0 or width % LANES or space_of(source) != "kTokens":
        return (
            f"its rows have {width or 'no static number of'} features, but kernels need multiples of {LANES}"
        )
    if node.attributes.get_int("batch_dims", 0) != 1 or dims_of(index) != ["batch", 1, 1]:
        return "it does not choose one token of each sequence"
    return None


def _check_attention(node: ir.Node) -> str | None:
    if input_of(node, 10) is not None and CHUNK not in node.metadata_props:
        return "it has a bias"
    sinks = input_of(node, 11)
    if sinks is not None and not (
        is_static(sinks) and dims_of(sinks) == [node.attributes["num_heads"].as_int()]
    ):
        return "its sinks are not a float32 vector of the model"
    if any(v is not None for v in node.inputs[12:]):
        return "its cache has scales"
    if input_of(node, 9) is not None and shift_of(node) is None:
        return "its position ids are not those of the mask"
    if node.attributes.get_int("smooth_softmax", 0):
        return "it has a smooth softmax"
    past = operand(node, 3)
    width = dims_of(past)[-1]
    if not isinstance(width, int) or width % LANES:
        return f"its heads are {width} wide, but kernels need multiples of {LANES}"
    shared = reads_shared_cache(node)
    if past.dtype != ir.DataType.FLOAT or not (past.is_graph_output() if shared else past.is_graph_input()):
        return "its cache is not float32"
    if not shared and any(not o.is_graph_output() for o in node.outputs[1:3]):
        return "its cache is not an output of the graph"
    if any(width_of(v) == 0 for v in node.inputs[: 1 if shared else 3] if v is not None):
        return "its query, key or value is not one row of features per token"
    return None


_CHECKS: dict[tuple[str, str], Callable[[ir.Node], str | None]] = {
    (MICROSOFT, "MatMulNBits"): _check_matmul,
    (MICROSOFT, "GatherBlockQuantized"): _check_embedding,
    (MICROSOFT, "GroupQueryAttention"): _check_attention,
    states.CONVOLUTION: states.check_convolution,
    states.ATTENTION: states.check_attention,
    ("", "GatherND"): _check_choice,
    rotary.ROTARY: rotary.check_rotary_embedding,
    ("", "Split"): layout.check_split,
    ("", "Slice"): layout.check_slice,
    ("", "Gather"): layout.check_gather,
    ("", "Concat"): layout.check_concat,
    ("", "Transpose"): layout.check_transpose,
    ("", "Expand"): layout.check_expand,
    **{("", op): layout.check_regroup for op in REGROUPING},
    **{("", op): layout.check_reduce for op in REDUCING},
    **dict.fromkeys(NORMS, _check_norm),
    **dict.fromkeys(UNARY, _check_elementwise),
    **{("", op): _check_elementwise for op in BINARY},
}
