"""Find out why an operator stays outside of compiled regions."""

from collections.abc import Callable

import onnx_ir as ir

from llmc.backends.compiled.expressions import BINARY, UNARY
from llmc.backends.compiled.operands import (
    NORMS,
    PARTS,
    codes_of,
    embedding_layout,
    layout_of,
    reads_shared_cache,
    scales_of,
    shift_of,
    slice_bounds,
    space_of,
    width_of,
)
from llmc.backends.compiled.pack import PackedLayout
from llmc.backends.compiled.program import LANES
from llmc.graph.domains import MICROSOFT
from llmc.graph.match import dims_of, operand, scalar_of
from llmc.graph.model import CHUNK, PackedZero
from llmc.graph.weights import LazyWeight


def obstacle(node: ir.Node) -> str | None:
    """Return the reason why `node` stays with ONNX Runtime; None if a region can contain it."""
    check = _CHECKS.get((node.domain, node.op_type))
    if check is None:
        return "there is no kernel for it"
    if any(o.dtype not in (ir.DataType.FLOAT, None) for o in node.outputs if o.uses() or o.is_graph_output()):
        return "it does not compute in float32"
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
    if not ids.is_graph_input() or ids.dtype != ir.DataType.INT64 or dims_of(ids) != ["batch", "sequence"]:
        return "its indices are not the token ids"
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
    width = width_of(node.outputs[0])
    if width == 0 or width % LANES:
        return (
            f"its rows have {width or 'no static number of'} features, but kernels need multiples of {LANES}"
        )
    rows = 0
    for index in range(len(node.inputs)):
        value = operand(node, index)
        if scalar_of(value) is not None:
            continue
        if value.const_value is not None:
            if dims_of(value) != [width] or value.dtype != ir.DataType.FLOAT:
                return "an operand is neither a row, nor a vector, nor a number"
        elif dims_of(value) == dims_of(node.outputs[0]):
            rows += 1
        else:
            return "an operand has another shape"
    return None if rows else "it reads no activation"


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


def _check_split(node: ir.Node) -> str | None:
    source = operand(node, 0)
    rank = len(dims_of(source))
    if width_of(source) == 0 or rank != 3 or node.attributes.get_int("axis", 0) % rank != 2:
        return "it is not along the features"
    if any(width_of(o) == 0 or width_of(o) % LANES for o in node.outputs):
        return f"the widths of its parts are not multiples of {LANES}"
    return None


def _check_slice(node: ir.Node) -> str | None:
    bounds = slice_bounds(node)
    if bounds is None:
        return "it does not cut features at constant places"
    width = width_of(node.outputs[0])
    if width == 0 or width % LANES or width != bounds[1] - bounds[0]:
        return (
            f"its rows have {width or 'no static number of'} features, but kernels need multiples of {LANES}"
        )
    return None


def _check_reshape(node: ir.Node) -> str | None:
    before, after = operand(node, 0), node.outputs[0]
    if max(len(dims_of(before)), len(dims_of(after))) > 4:
        return "a tensor has more than 4 dimensions"
    same = (
        width_of(before) and width_of(before) == width_of(after) and dims_of(before)[:2] == dims_of(after)[:2]
    )
    return None if same else "it changes more than how features are grouped"


def _check_attention(node: ir.Node) -> str | None:
    bias = node.inputs[10] if len(node.inputs) > 10 else None
    if (bias is not None and CHUNK not in node.metadata_props) or any(
        v is not None for v in node.inputs[11:]
    ):
        return "it has a bias or sinks"
    if len(node.inputs) > 9 and node.inputs[9] is not None and shift_of(node) is None:
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
    ("", "GatherND"): _check_choice,
    ("", "Split"): _check_split,
    ("", "Slice"): _check_slice,
    ("", "Reshape"): _check_reshape,
    **dict.fromkeys(NORMS, _check_norm),
    **dict.fromkeys(UNARY, _check_elementwise),
    **{("", op): _check_elementwise for op in BINARY},
}
