"""Products of one activation as one product and a split."""

import onnx_ir as ir

from llmc.config import Dtype
from llmc.graph.model import Graph
from tests.lowering import lower
from tests.passes.harness import LAYERS, counts, hold_numbers, lowered, operators, run_pass


def test_applies_everywhere_and_keeps_the_numbers() -> None:
    before, after, report = lowered("pack-shared", "qwen2", ["linear"])
    assert counts(report) == ([2] * LAYERS, 0)
    assert operators(before)["MatMul"] - operators(after)["MatMul"] == 3 * LAYERS
    hold_numbers(before, after)


def test_products_of_one_activation_are_packed() -> None:
    graph, reports = lower("llama", Dtype.FLOAT16, last="pack-shared")
    assert [reports["pack-shared"].in_layer(i) for i in range(LAYERS)] == [2] * LAYERS
    assert operators(graph)["MatMul"] == 4 * LAYERS + 1
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight" in graph.graph.initializers


def test_declines_weights_stored_by_inputs() -> None:
    graph, _ = lower("llama", Dtype.FLOAT32)
    transpose = next(n for n in graph.graph if n.op_type == "Transpose" and n.inputs[0] in _weights(graph))
    weight = transpose.inputs[0]
    assert weight is not None
    weight.shape = ir.Shape(list(weight.shape or ())[::-1])
    ir.convenience.replace_all_uses_with(transpose.outputs[0], weight)
    report = run_pass("pack-shared", graph)
    assert [(r.code, r.layer) for r in report.refusals] == [("layout", 0)]


def _weights(graph: Graph) -> list[ir.Value]:
    return list(graph.graph.initializers.values())
