"""Reductions that CUDA computes without cuDNN have the same values."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmc.backends.onnxruntime.cudnn import needs_cudnn
from llmc.backends.onnxruntime.reductions import reduce_without_cudnn
from llmc.graph.model import Graph

ROWS = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)


def graph_of(op: str, axes: list[int], keepdims: int) -> Graph:
    node = helper.make_node(op, ["x", "axes"], ["y"], keepdims=keepdims)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constant = numpy_helper.from_array(np.array(axes, np.int64), "axes")
    graph = helper.make_graph([node], "reduction", [x], [y], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Graph(ir.from_proto(model), (), 1)


def run(graph: Graph) -> np.ndarray:
    session = ort.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values: np.ndarray = session.run(None, {"x": ROWS})[0]
    return values


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin", "ReduceL1"])
def test_one_axis_is_reduced_without_cudnn(op: str, axis: int, keepdims: int) -> None:
    graph = graph_of(op, [axis], keepdims)
    before = run(graph)
    assert needs_cudnn(graph.model) is not None
    assert reduce_without_cudnn(graph) == 1
    assert needs_cudnn(graph.model) is None
    np.testing.assert_allclose(run(graph), before, rtol=1e-6)


def test_several_axes_stay() -> None:
    graph = graph_of("ReduceMax", [0, 1], 1)
    assert reduce_without_cudnn(graph) == 0
