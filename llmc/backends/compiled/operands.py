"""Read a node's operands: rows of features, vectors, numbers, packed matrices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from llmc.backends.compiled.pack import PackedLayout
from llmc.backends.compiled.program import Space
from llmc.graph.domains import MICROSOFT
from llmc.graph.match import behind, constant_of, dims_of, input_of, made_by, operand
from llmc.graph.model import PackedZero

#: Bytes of an activation's code by the accuracy level of MatMulNBits: 4 needs int8, 2 at least float16.
PARTS = {4: 1, 2: 2}
#: Norms by domain and name: whether the mean is subtracted, whether a sum is included.
NORMS = {
    ("", "SimplifiedLayerNormalization"): (False, False),
    ("", "LayerNormalization"): (True, False),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): (False, True),
    (MICROSOFT, "SkipLayerNormalization"): (True, True),
}


def features_of(value: ir.Value) -> tuple[int, ...]:
    """Return the dimensions of one row of an activation; none if the value is not an activation.

    An activation has a row per token, (batch, sequence, …), or per sequence, (batch, 1, …). Rows per token
    may be flattened, (n * batch * sequence, …), which are n neighbouring parts of a row; or turned.
    """
    dims = dims_of(value)
    if is_turned(value):
        dims = [dims[0], dims[2], dims[1]]
    elif (parts := parts_per_token(dims)) > 0:
        dims = ["batch", "sequence", parts, *dims[1:]]
    if len(dims) < 3 or dims[0] != "batch" or dims[1] not in ("sequence", 1):
        return ()
    features = tuple(d for d in dims[2:] if isinstance(d, int))
    return features if len(features) == len(dims) - 2 else ()


def width_of(value: ir.Value) -> int:
    """Return the number of features of one row of an activation; 0 if the value is not an activation."""
    features = features_of(value)
    return math.prod(features) if features else 0


def is_turned(value: ir.Value) -> bool:
    """Tell whether an activation is (batch, features, sequence); a region keeps it as rows all the same."""
    dims = dims_of(value)
    return len(dims) == 3 and dims[0] == "batch" and isinstance(dims[1], int) and dims[2] == "sequence"


def parts_per_token(dims: Sequence[int | str]) -> int:
    """Return n of a tensor (n * batch * sequence, …); 0 for any other tensor."""
    factors = str(dims[0]).split("*") if dims else []
    numbers = [int(f) for f in factors if f.isdecimal()]
    names = sorted(f for f in factors if not f.isdecimal())
    return math.prod(numbers) if len(dims) > 1 and names == ["batch", "sequence"] else 0


def space_of(value: ir.Value) -> Space:
    dims = dims_of(value)
    return "kLast" if dims[0] == "batch" and dims[1] == 1 and not is_turned(value) else "kTokens"


@dataclass(frozen=True)
class Spread:
    """The way in which the numbers of a row or a vector fill wider rows.

    They are `outer` parts of `inner` numbers, and each part stands `copies` times.
    """

    outer: int
    copies: int
    inner: int


def is_static(value: ir.Value) -> bool:
    """Tell whether a value is a float32 vector or matrix that does not depend on the tokens."""
    dims = dims_of(value)
    fixed = all(isinstance(d, int) for d in dims)
    return fixed and value.dtype == ir.DataType.FLOAT and (bool(dims) or value.const_value is not None)


def spread_of(value: ir.Value, output: ir.Value) -> Spread | None:
    """Return how an operand broadcasts to the rows of `output`; None if it does not in such a way."""
    target = features_of(output)
    source = _vector_features(value, output) if is_static(value) else _row_features(value, output)
    if not target or len(source) != len(target):
        return None
    widened = [i for i, (a, b) in enumerate(zip(source, target, strict=True)) if a != b]
    first, last = (widened[0], widened[-1] + 1) if widened else (len(target), len(target))
    if any(size != 1 for size in source[first:last]):
        return None
    return Spread(math.prod(target[:first]), math.prod(target[first:last]), math.prod(target[last:]))


def _row_features(value: ir.Value, output: ir.Value) -> tuple[int, ...]:
    """Return the features of an activation that has the rows of `output`; none for another value."""
    dims, target = dims_of(value), dims_of(output)
    alike = len(dims) == len(target) and dims[:1] == target[:1] and is_turned(value) == is_turned(output)
    return features_of(value) if alike and space_of(value) == space_of(output) else ()


def _vector_features(value: ir.Value, output: ir.Value) -> tuple[int, ...]:
    """Return the dimensions of a static operand, extended by 1 to as many as a row of `output` has."""
    sizes, count = [int(d) for d in dims_of(value)], len(features_of(output))
    if is_turned(output):
        if sizes[-1:] != [1]:
            return ()
        sizes = sizes[:-1]
    while len(sizes) > count and sizes[0] == 1:
        sizes = sizes[1:]
    return (*(1 for _ in range(count - len(sizes))), *sizes)


def slice_bounds(node: ir.Node) -> tuple[int, int] | None:
    """Return (first, one past the last) of a Slice of the features with constant bounds and step 1."""
    source = node.inputs[0]
    constants = [constant_of(v) for v in node.inputs[1:]]
    if source is None or len(constants) < 3 or len(dims_of(source)) != 3 or width_of(source) == 0:
        return None
    numbers = [None if c is None or c.size != 1 else int(c.numpy().reshape(())) for c in constants]
    start, stop, axis, step = (*numbers, 1)[:4]
    if start is None or stop is None or axis not in (2, -1) or step != 1:
        return None
    width = width_of(source)
    low, high = (min(max(x + width if x < 0 else x, 0), width) for x in (start, stop))
    return low, high


def shift_of(node: ir.Node) -> ir.Value | None:
    """Return what is added to the positions of an attention's tokens for its rotary tables, int64 ().

    Returns None if nothing is added, or if its position ids are computed in another way.
    """
    added = made_by(input_of(node, 9), "Add")
    if added is None:
        return None
    source, shift = operand(added, 0), operand(added, 1)
    plain = source.name == "position_ids" and source.is_graph_input()
    return shift if plain and dims_of(shift) == [] and shift.dtype is ir.DataType.INT64 else None


def reads_shared_cache(node: ir.Node) -> bool:
    """Return whether an attention reads the cache that another layer has extended, and has no present."""
    return not any(output.name for output in node.outputs[1:3])


def codes_of(node: ir.Node) -> ir.Value:
    """Return the codes of an embedding, before the reshape that is in between if a product shares them."""
    return behind(operand(node, 0), "Reshape")


def scales_of(node: ir.Node) -> list[ir.Value]:
    """Return the scales and, if there are any, zero points of a product or an embedding, as stored.

    If their type differs from the activations' type, a Cast follows them.
    """
    return [behind(value, "Cast") for value in node.inputs[2:4] if value is not None]


def _zero_of(node: ir.Node) -> PackedZero:
    zeros = input_of(node, 3)
    if zeros is None:
        return PackedZero.MIDDLE
    return PackedZero.CODE if zeros.dtype == ir.DataType.UINT8 else PackedZero.MINIMUM


def layout_of(node: ir.Node) -> PackedLayout:
    n, k, bits, block = (node.attributes[a].as_int() for a in ("N", "K", "bits", "block_size"))
    return PackedLayout(n, k, bits, block, _zero_of(node))


def embedding_layout(node: ir.Node) -> PackedLayout:
    bits, block = (node.attributes[a].as_int() for a in ("bits", "block_size"))
    features = _features_of(node.outputs[0], block)
    return PackedLayout(int(dims_of(operand(node, 2))[0]), features, bits, block, _zero_of(node))


def _features_of(rows: ir.Value, block: int) -> int:
    """Return the features of an embedding's rows, without padding of the last block that a Slice cuts off."""
    width, users = width_of(rows), [user for user, _ in rows.uses()]
    if len(users) != 1 or users[0].op_type != "Slice" or rows.is_graph_output():
        return width
    start, stop = slice_bounds(users[0]) or (0, width)
    return stop if start == 0 and width - block < stop else width
