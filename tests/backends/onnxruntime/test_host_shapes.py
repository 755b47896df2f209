"""Sizes that the host reads share no buffer, and have the same values."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from llmc.backends.onnxruntime.host_shapes import copy_host_sizes
from llmc.graph.model import Graph

SIZE = {"start": 1, "end": 2}


def graph_of_sizes() -> Graph:
    """Return a graph that reshapes by two sizes, as the exporter does, and has one in a function."""
    nodes = [
        helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
        helper.make_node("Squeeze", ["rows"], ["rows_scalar"]),
        helper.make_node("Reshape", ["rows_scalar", "whole"], ["rows_vector"]),
        helper.make_node("Shape", ["x"], ["columns"], **SIZE),
        helper.make_node("Reshape", ["rows", "whole"], ["rows_again"]),
        helper.make_node("Mul", ["rows_again", "rows_again"], ["square"]),
        helper.make_node("Squeeze", ["columns"], ["columns_scalar"]),
        helper.make_node("Unsqueeze", ["columns_scalar", "axis"], ["columns_vector"]),
        helper.make_node("Concat", ["columns_vector", "rows_vector"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["turned"]),
        helper.make_node("Add", ["columns_scalar", "rows_scalar"], ["sum"]),
        helper.make_node("Width", ["x"], ["width"], domain="test"),
    ]
    inner = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["inner_vector"], **SIZE),
            helper.make_node("Squeeze", ["inner_vector"], ["inner_scalar"]),
            helper.make_node("Squeeze", ["columns"], ["outer_scalar"]),
            helper.make_node("Add", ["inner_scalar", "outer_scalar"], ["inner_number"]),
        ],
        "branch",
        [],
        [helper.make_tensor_value_info("inner_number", TensorProto.INT64, [])],
    )
    nodes.append(helper.make_node("If", ["always"], ["branch"], then_branch=inner, else_branch=inner))
    body = [
        helper.make_node("Shape", ["of"], ["vector"], **SIZE),
        helper.make_node("Squeeze", ["vector"], ["number"]),
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("test", 1)]
    function = helper.make_function("test", "Width", ["of"], ["number"], body, opsets[:1])
    integers = [
        helper.make_tensor_value_info(name, TensorProto.INT64, []) for name in ("sum", "width", "branch")
    ]
    integers.append(helper.make_tensor_value_info("square", TensorProto.INT64, [1]))
    graph = helper.make_graph(
        nodes,
        "sizes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b"])],
        [helper.make_tensor_value_info("turned", TensorProto.FLOAT, ["b", "a"]), *integers],
        [
            numpy_helper.from_array(np.array(value), name)
            for name, value in (("whole", [-1]), ("axis", [0]), ("always", True))
        ],
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    return Graph(ir.from_proto(model), (), layers=0)


def test_sizes_are_copied_by_the_host() -> None:
    graph = graph_of_sizes()
    assert copy_host_sizes(graph) == 8
    owners = (graph.graph, *graph.model.functions.values())
    operators = {n.op_type for owner in owners for n in owner.all_nodes()}
    assert operators == {"Shape", "Gather", "Constant", "Concat", "Reshape", "Mul", "Add", "Width", "If"}
    session = ort.InferenceSession(ir.to_proto(graph.model).SerializeToString())
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    turned, *numbers = session.run(None, {"x": x})
    np.testing.assert_array_equal(turned, x.reshape(3, 2))
    assert [int(number.item()) for number in numbers] == [5, 3, 6, 4]
