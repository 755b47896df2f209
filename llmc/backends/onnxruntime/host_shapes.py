"""Keep values that CUDA's nodes write on the host from being overwritten before the host reads them.

Under ONNX Runtime's CUDA provider, Shape runs in the order of CUDA's nodes and writes to host memory. Squeeze
and Reshape of its result run in the order of the CPU's nodes and share its buffer. The plan of reused memory
is made order by order (1.31.1; issue 19480 of microsoft/onnxruntime has the cause), so that a later Shape can
get a buffer that is still to be read: a tiny DeepSeek-V3 took the size of its batch for the length of the
step. Without operators that share it, each buffer is kept until it was read.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.errors import GraphError
from llmc.graph.domains import STANDARD
from llmc.graph.edit import add_constant, drop_dead, set_value, take_over
from llmc.graph.match import input_of, ints_of, is_op
from llmc.graph.model import Graph

_ZERO = np.array(0, np.int64)


def copy_host_sizes(graph: Graph) -> int:
    """Let the host copy sizes instead of sharing them, in the graph and all within it; return how often."""
    owners: list[ir.Graph | ir.Function] = [graph.graph, *graph.model.functions.values()]
    sizes = [node for owner in owners for node in owner.all_nodes() if _is_one_size(node)]
    copied = sum(_copy_size(graph.graph, node) for node in sizes)
    drop_dead(graph.graph)
    return copied


def _is_one_size(node: ir.Node) -> bool:
    """Return whether a node gives the size of one dimension."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 0)
    return is_op(node, "Shape") and end - start == 1


def _copy_size(graph: ir.Graph, node: ir.Node) -> int:
    """Replace each Squeeze of a size by a Gather, and what makes a vector of it again by the size itself."""
    size, copied = node.outputs[0], 0
    for user in size.consumers():
        if is_op(user, "Reshape"):
            copied += _take_vector(user, size, size)
        elif is_op(user, "Squeeze"):
            for vector in user.outputs[0].consumers():
                _take_vector(vector, user.outputs[0], size)
            _take_scalar(graph, user, size)
            copied += 1
    return copied


def _take_vector(node: ir.Node, operand: ir.Value, size: ir.Value) -> bool:
    """Replace the result of a node by a size if that is what it makes of a value of one element."""
    makes = is_op(node, "Reshape") and ints_of(input_of(node, 1)) in ([-1], [1])
    makes = makes or (is_op(node, "Unsqueeze") and operand is not size)
    if input_of(node) is not operand or not makes or node.outputs[0].is_graph_output():
        return False
    ir.convenience.replace_all_uses_with(node.outputs[0], size)
    return True


def _take_scalar(graph: ir.Graph, squeeze: ir.Node, size: ir.Value) -> None:
    scalar, owner = squeeze.outputs[0], squeeze.graph
    if owner is None:
        raise GraphError(f"{squeeze.name} is in no graph")
    first = add_constant(graph, _ZERO, "first") if owner is graph else _constant_zero(owner, squeeze)
    copy = ir.Node(STANDARD, "Gather", [size, first], name=squeeze.name)
    owner.insert_before(squeeze, copy)
    take_over(scalar, copy.outputs[0])
    owner.remove(squeeze, safe=True)


def _constant_zero(owner: ir.Graph | ir.Function, before: ir.Node) -> ir.Value:
    constant = ir.Node(STANDARD, "Constant", [], [ir.AttrTensor("value", ir.tensor(_ZERO))])
    owner.insert_before(before, constant)
    return set_value(constant.outputs[0], f"{before.outputs[0].name}_first", [], ir.DataType.INT64)
