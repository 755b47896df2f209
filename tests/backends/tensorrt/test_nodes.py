"""Every node that TensorRT would refuse, asked of its parser one signature at a time."""

import numpy as np
import onnx_ir as ir
import pytest

from llmc.backends.tensorrt.engine import load_library
from llmc.backends.tensorrt.nodes import check_nodes
from llmc.backends.tensorrt.support import Library
from llmc.config import Dtype, EngineRule, EngineScheme, WeightFormat
from llmc.quantize.engine import quantize_for_engine
from tests.lowering import lower

TRT = load_library(Library.RTX)
HALF = ir.DataType.FLOAT16
INT4 = EngineRule(scheme=EngineScheme(format=WeightFormat.INT4, block_size=16))


def _value(name: str, dtype: ir.DataType | None, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=None if dtype is None else ir.TensorType(dtype))


def _model(inputs: list[ir.Value], nodes: list[ir.Node], constants: tuple[ir.Value, ...] = ()) -> ir.Model:
    imports = {"": 24, "com.microsoft": 1}
    graph = ir.Graph(
        inputs,
        [v for node in nodes for v in node.outputs if not v.uses()],
        nodes=nodes,
        initializers=constants,
        opset_imports=imports,
        name="graph",
    )
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
def test_a_graph_that_builds_has_nothing_refused(model_type: str) -> None:
    graph, _ = lower(model_type, Dtype.FLOAT16, last="pack-shared")
    quantize_for_engine(graph, (INT4,), None)
    report = check_nodes(graph.model, TRT)
    assert (report.refused, report.unknown) == ((), ())
    assert report.nodes == len(graph.graph)
    assert report.signatures < report.nodes / 2
    assert report.version == TRT.__version__


def test_all_refusals_are_told_by_signature() -> None:
    x = _value("x", HALF, "batch", 8)
    first = ir.node("QuickGelu", [x], domain="com.microsoft", name="gelu.0")
    second = ir.node("Relu", first.outputs, name="relu")
    third = ir.node("QuickGelu", second.outputs, domain="com.microsoft", name="gelu.1")
    for layer, node in enumerate((first, second, third)):
        node.metadata_props["llmc.layer"] = str(layer)
        node.outputs[0].shape, node.outputs[0].type = x.shape, x.type
        node.outputs[0].name = f"y{layer}"
    queries = [_value(name, HALF, "batch", 4, "sequence", 64) for name in "qkv"]
    attention = ir.node("Attention", queries, attributes={"softcap": 50.0}, name="attention")
    attention.outputs[0].name = "attended"
    attention.outputs[0].shape, attention.outputs[0].type = queries[0].shape, queries[0].type
    report = check_nodes(_model([x, *queries], [first, second, third, attention]), TRT)
    gelu, capped = report.refused
    assert (gelu.operator, gelu.node, gelu.count) == ("com.microsoft::QuickGelu", "gelu.0", 2)
    assert gelu.layers == (0, 2)
    assert gelu.inputs == ("float16[batch, 8]",)
    assert "an operator of ONNX Runtime" in gelu.advice
    assert (capped.operator, capped.count, capped.layers) == ("Attention", 1, ())
    assert "softcap" in capped.reason
    assert "build for a cuda target" in capped.advice
    assert (report.nodes, report.signatures, report.unknown) == (4, 3, ())


def test_a_node_behind_an_unknown_type_is_no_refusal() -> None:
    x = _value("x", HALF, "batch", 8)
    first = ir.node("QuickGelu", [x], domain="com.microsoft", name="gelu")
    second = ir.node("Relu", first.outputs, name="relu")
    first.outputs[0].name, second.outputs[0].name = "between", "y"
    report = check_nodes(_model([x], [first, second]), TRT)
    assert [found.node for found in report.refused] == ["gelu"]
    assert [found.node for found in report.unknown] == ["relu"]
    assert report.unknown[0].reason == "the type or the shape of its input between is not known"


def test_zero_points_and_types_that_tensorrt_lacks_are_refused() -> None:
    weights = [
        ir.Value(name=name, const_value=ir.tensor(data, name=name))
        for name, data in (
            ("codes", np.ones((16, 16), np.uint8)),
            ("scales", np.ones(16, np.float16)),
            ("zeros", np.full(16, 128, np.uint8)),
        )
    ]
    for value in weights:
        tensor = value.const_value
        assert tensor is not None
        value.shape, value.type = tensor.shape, ir.TensorType(tensor.dtype)
    node = ir.node("DequantizeLinear", weights, attributes={"axis": 0}, name="weight")
    node.outputs[0].name = "w"
    report = check_nodes(_model([], [node], tuple(weights)), TRT)
    (found,) = report.refused
    assert found.inputs == ("uint8[16, 16]", "float16[16]", "uint8[16]")
    assert found.reason
