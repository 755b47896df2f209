"""Replace reductions that ONNX Runtime's CUDA provider leaves to cuDNN by operators with kernels of its own.

The largest and the smallest of an axis are the first of TopK; a sum of absolute values is a sum. Routers of
experts compute both (PhiMoE, DBRX).
"""

import numpy as np
import onnx_ir as ir

from llmc.graph.edit import Site, add_constant, drop_dead, set_value, take_over
from llmc.graph.match import FLOATS, dims_of, find_nodes, input_of, ints_of
from llmc.graph.model import Graph


def reduce_without_cudnn(graph: Graph) -> int:
    """Replace ReduceMax, ReduceMin and ReduceL1 over one axis of floats; return how often."""
    replaced = 0
    for op in ("ReduceMax", "ReduceMin", "ReduceL1"):
        for node in find_nodes(graph.graph, op):
            axes, value = ints_of(input_of(node, 1)), input_of(node)
            if axes is None or len(axes) != 1 or value is None or value.dtype not in FLOATS:
                continue
            _replace(graph.graph, node, value, axes[0])
            replaced += 1
    drop_dead(graph.graph)
    return replaced


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value, axis: int) -> None:
    site, output = Site(graph, node), node.outputs[0]
    name, keepdims = str(output.name), node.attributes.get_int("keepdims", 1)
    axes = add_constant(graph, np.array([axis], np.int64), "axis")
    if node.op_type == "ReduceL1":
        sizes = site.emit("Abs", [value], f"{name}/sizes", like=value).outputs[0]
        reduced = site.emit("ReduceSum", [sizes, axes], name, attributes={"keepdims": keepdims}, like=output)
        take_over(output, reduced.outputs[0])
        return
    dims = dims_of(value)
    dims[axis] = 1
    one = add_constant(graph, np.array([1], np.int64), "axis")
    order = {"axis": axis, "largest": int(node.op_type == "ReduceMax")}
    first = site.emit(
        "TopK", [value, one], f"{name}/first", attributes=order, like=value, shape=dims, outputs=2
    )
    set_value(first.outputs[1], f"{name}/place", dims, ir.DataType.INT64)
    found = first.outputs[0]
    if not keepdims:
        found = site.emit("Squeeze", [found, axes], f"{name}/squeezed", like=output).outputs[0]
    take_over(output, found)
