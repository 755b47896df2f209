"""Read a graph: producers, users, constants and shapes, and values behind casts and slices.

These functions match by structure alone, and change nothing.
"""

from collections.abc import Iterator

import onnx_ir as ir

from llmc.arrays import Array
from llmc.errors import GraphError
from llmc.graph.weights import LazyWeight

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def made_by(value: ir.Value | None, op: str, domain: str = "") -> ir.Node | None:
    """Return the node that makes `value`; None if that is not an `op` of `domain`."""
    node = None if value is None else value.producer()
    return node if node is not None and is_op(node, op, domain) else None


def is_op(node: ir.Node, op: str, domain: str = "") -> bool:
    """Tell whether `node` is operator `op` of `domain`."""
    return node.op_type == op and node.domain == domain


def only_user(value: ir.Value) -> ir.Node | None:
    """Return the only node that reads `value`; None if it is a graph output or several nodes read it."""
    users = value.consumers()
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def operands(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield both orders of the inputs of a commutative operator."""
    first, second = node.inputs
    if first is not None and second is not None:
        yield first, second
        yield second, first


def operand_beside(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the other input of a binary operator that reads `value`; `value` itself if it reads it twice."""
    first, second = node.inputs
    return second if first is value else first


def find_nodes(graph: ir.Graph, op: str, domain: str = "") -> list[ir.Node]:
    """Return every `op` of `domain`, in graph order."""
    return [node for node in graph if is_op(node, op, domain)]


def behind(value: ir.Value, op: str) -> ir.Value:
    """Return the first input of the standard `op` that makes `value`; `value` itself if none makes it."""
    node = made_by(value, op)
    return value if node is None else operand(node, 0)


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return input `index` of `node`, which must be there.

    Raises:
        GraphError: The node has no such input.
    """
    value = input_of(node, index)
    if value is None:
        raise GraphError(f"{node.op_type} {node.name} has no input {index}")
    return value


def input_of(node: ir.Node, index: int = 0) -> ir.Value | None:
    """Return input `index` of `node`; None if it has no such input."""
    return node.inputs[index] if index < len(node.inputs) else None


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the data of a constant or of a small initializer; None for a weight or a computed value."""
    if value is None:
        return None
    tensor = value.const_value
    if tensor is None:
        node = value.producer()
        if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            return None
        return ir.convenience.get_const_tensor(value)
    return None if isinstance(tensor, LazyWeight) else tensor


def lazy_of(value: ir.Value) -> LazyWeight:
    """Return the lazy weight that `value` must be.

    Raises:
        GraphError: It is a constant or is computed.
    """
    tensor = value.const_value
    if not isinstance(tensor, LazyWeight):
        raise GraphError(f"{value.name} is not a weight of the checkpoint")
    return tensor


def array_of(value: ir.Value | None) -> Array | None:
    """Read the data of an initializer, weights included; None if `value` has none."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def scalar_of(value: ir.Value | None) -> float | None:
    """Return the number in a constant with one element; None for any other value."""
    tensor = constant_of(value)
    return float(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def is_scalar(value: ir.Value | None, expected: float, tolerance: float = 1e-6) -> bool:
    """Tell whether `value` is a constant with one element near `expected`, relative to its size."""
    number = scalar_of(value)
    return number is not None and abs(number - expected) <= tolerance * max(1.0, abs(expected))


def ints_of(value: ir.Value | None) -> list[int] | None:
    """Return the elements of an integer constant; None for any other value."""
    tensor = constant_of(value)
    if tensor is None or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return [int(x) for x in tensor.numpy().reshape(-1)]


def dims_of(value: ir.Value | None) -> list[int | str]:
    """Return the shape of `value`, symbolic dimensions by name; an empty list if it is not known."""
    if value is None or value.shape is None:
        return []
    return [d if isinstance(d, int) else str(d.value) for d in value.shape]


def last_dim_of(value: ir.Value | None) -> int | None:
    """Return the last dimension of `value`; None if it is not static or not known."""
    dims = dims_of(value)
    return dims[-1] if dims and isinstance(dims[-1], int) else None


def rank_of(value: ir.Value | None) -> int:
    """Return the number of dimensions; 0 if it is not known."""
    return len(dims_of(value))


def uncast(value: ir.Value) -> ir.Value:
    """Return `value` as it is before casts between float32 and float16."""
    while (cast := made_by(value, "Cast")) is not None:
        source = cast.inputs[0]
        if source is None or source.dtype not in FLOATS or value.dtype not in FLOATS:
            break
        value = source
    return value


def count_plain_attention(graph: ir.Graph) -> int:
    """Count the softmaxes over a dimension of dynamic size, as attention in plain operators has over keys."""
    return sum(last_dim_of(node.outputs[0]) is None for node in find_nodes(graph, "Softmax"))


def permutation_of(node: ir.Node) -> list[int] | None:
    """Return `perm` of a Transpose; None if it does not state it."""
    attribute = node.attributes.get("perm")
    return None if attribute is None else [int(x) for x in attribute.as_ints()]


def slice_of(value: ir.Value | None) -> tuple[ir.Value, int, int, int, int] | None:
    """Return (source, axis, start, stop, step) of a Slice with constant bounds along one axis, else None.

    The axis and the bounds are non-negative; bounds past the end are clipped to a static dimension.
    """
    node = made_by(value, "Slice")
    if node is None or node.inputs[0] is None or len(node.inputs) < 4:
        return None
    bounds = [ints_of(v) for v in node.inputs[1:]]
    if any(b is None or len(b) != 1 for b in bounds):
        return None
    start, stop, axis = (b[0] for b in bounds[:3] if b is not None)
    step = bounds[3][0] if len(bounds) > 3 and bounds[3] is not None else 1
    dims = dims_of(node.inputs[0])
    size = dims[axis] if -len(dims) <= axis < len(dims) else None
    if not isinstance(size, int) or step < 1:
        return None
    start, stop = (min(max(x + size if x < 0 else x, 0), size) for x in (start, stop))
    return node.inputs[0], axis % len(dims), start, stop, step


def split_of(value: ir.Value | None) -> tuple[ir.Value, int, int, int] | None:
    """Return (source, axis, start, stop) of one output of a Split into static parts, else None."""
    node = None if value is None else value.producer()
    if value is None or node is None or not is_op(node, "Split") or node.inputs[0] is None:
        return None
    rank = rank_of(node.inputs[0])
    if not rank:
        return None
    axis = node.attributes.get_int("axis", 0) % rank
    start = 0
    for output in node.outputs:
        dims = dims_of(output)
        size = dims[axis] if len(dims) == rank else None
        if not isinstance(size, int):
            return None
        if output is value:
            return node.inputs[0], axis, start, start + size
        start += size
    return None


def part_of(value: ir.Value | None) -> tuple[ir.Value, int, int, int, int] | None:
    """Return (source, axis, start, stop, step) of a Slice or of an output of a Split, else None."""
    if (split := split_of(value)) is not None:
        return (*split, 1)
    return slice_of(value)
