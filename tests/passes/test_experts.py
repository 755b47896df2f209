"""A layer of experts as MoE: counts, numbers of real architectures, and refusals."""

import numpy as np
import onnx_ir as ir
import pytest

from llmc.config import Dtype
from llmc.graph import dialect
from llmc.graph.model import Graph
from llmc.graph.serial import load_graph
from llmc.graph.weights import ExpertRows, LazyWeight, WeightGroup
from tests.caches import shared_trace
from tests.lowering import tiny
from tests.models import build_tiny_model
from tests.passes.harness import LAYERS, graph_of, logits_of, run_pass
from tests.state_store import StateStore

# Weights normalised after the choice, before it, and by a softmax after it; the last with biases and a limit.
MODELS = ("mixtral", "qwen3_moe", "gpt_oss")


def _experts(graph: Graph) -> list[ir.Node]:
    return [n for n in graph.graph if n.op_type == dialect.EXPERTS]


def _half(model_type: str, **sizes: int) -> Graph:
    model = build_tiny_model(model_type, **sizes)
    graph = load_graph(shared_trace(model.config, Dtype.FLOAT16))
    graph.bind(StateStore(model), {})
    return graph


@pytest.mark.parametrize("model_type", MODELS)
def test_lowering_keeps_the_numbers(model_type: str) -> None:
    graph = graph_of(model_type)
    assert len(_experts(graph)) == LAYERS
    expected = logits_of(graph)
    report = run_pass("experts", graph)
    assert report.applied == (0, 1, 2)
    assert report.refusals == ()
    assert _experts(graph) == []
    assert [key for key in graph.model.functions if key[1] == dialect.EXPERTS] == []
    assert [n.op_type for n in graph.graph].count("MoE") == LAYERS
    np.testing.assert_allclose(logits_of(graph), expected, atol=1e-4)


def test_a_sum_that_is_kept_above_zero_is_not_negative() -> None:
    """The router of Ernie 4.5 divides by it."""
    graph = graph_of("ernie4_5_moe")
    expected = logits_of(graph)
    count = len(_experts(graph))
    report = run_pass("experts", graph)
    assert (len(report.applied), report.refusals) == (count, ())
    np.testing.assert_allclose(logits_of(graph), expected, atol=1e-4)


def test_experts_without_a_gate_read_one_matrix_as_gate_and_up() -> None:
    """Nemotron-H squares the ReLU of the only matrix before the last."""
    graph = graph_of("nemotron_h")
    expected = logits_of(graph)
    assert len(_experts(graph)) == 1
    report = run_pass("experts", graph)
    assert (len(report.applied), report.refusals) == (1, ())
    (mixture,) = (n for n in graph.graph if n.op_type == "MoE")
    matrix = mixture.inputs[2]
    assert matrix is not None
    assert isinstance(matrix.const_value, LazyWeight)
    assert isinstance(matrix.const_value.rows, ExpertRows)
    assert matrix.const_value.rows.doubled
    np.testing.assert_allclose(logits_of(graph), expected, atol=1e-4)


def test_declines_weights_that_may_be_negative() -> None:
    graph = graph_of("mixtral")
    node = _experts(graph)[0]
    weights = node.inputs[2]
    assert weights is not None
    negated = ir.node("Neg", [weights])
    negated.outputs[0].name, negated.outputs[0].shape = "negated", weights.shape
    negated.outputs[0].type = weights.type
    graph.graph.insert_before(node, negated)
    node.replace_input_with(2, negated.outputs[0])
    report = run_pass("experts", graph)
    assert [(r.code, r.layer) for r in report.refusals] == [("signed-weights", 0)]
    assert report.applied == (1, 2)
    assert len(_experts(graph)) == 1
    assert any(key[1] == dialect.EXPERTS for key in graph.model.functions)


def test_declines_experts_that_no_topk_chose() -> None:
    graph = graph_of("mixtral")
    node = _experts(graph)[1]
    indices = node.inputs[1]
    assert indices is not None
    doubled = ir.node("Add", [indices, indices])
    doubled.outputs[0].name, doubled.outputs[0].shape = "doubled", indices.shape
    doubled.outputs[0].type = indices.type
    graph.graph.insert_before(node, doubled)
    node.replace_input_with(1, doubled.outputs[0])
    assert [(r.code, r.layer) for r in run_pass("experts", graph).refusals] == [("routing", 1)]


def test_declines_computed_weights() -> None:
    graph = graph_of("mixtral")
    down = _experts(graph)[2].inputs[4]
    assert down is not None
    data = np.zeros((4, 64, 96), np.float32)
    group = WeightGroup(("a",), lambda: {"value": data})
    down.const_value = LazyWeight(
        name=str(down.name), dtype=ir.DataType.FLOAT, shape=data.shape, group=group, key="value"
    )
    assert [(r.code, r.layer) for r in run_pass("experts", graph).refusals] == [("computed", 2)]


def test_rows_of_experts() -> None:
    store = StateStore(tiny("gpt_oss"))
    array = store.arrays["model.layers.0.mlp.experts.gate_up_proj"]

    class Whole:
        shape, dtype, sources = array.shape, ir.DataType.FLOAT, ("w",)

        def rows(self, start: int, stop: int) -> np.ndarray:
            return array[start:stop]

    turned = ExpertRows(Whole(), transposed=True, interleave=True)
    assert turned.shape == (4, 192, 64)
    rows = turned.rows(1, 3)
    np.testing.assert_array_equal(rows[:, 0], array[1:3, :, 0])
    np.testing.assert_array_equal(rows[:, 1], array[1:3, :, 96])
    np.testing.assert_array_equal(rows[:, 2], array[1:3, :, 1])
    np.testing.assert_array_equal(turned.undo(rows), array[1:3])
    doubled = ExpertRows(Whole(), transposed=True, interleave=True, doubled=True)
    assert doubled.shape == (4, 384, 64)
    rows = doubled.rows(1, 3)
    np.testing.assert_array_equal(rows[:, ::2], rows[:, 1::2])
    np.testing.assert_array_equal(rows[:, ::2], array[1:3].swapaxes(1, 2))
    np.testing.assert_array_equal(doubled.undo(rows), array[1:3])


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_all_that_the_operator_reads_is_float16(model_type: str) -> None:
    """The router of mixtral weighs in float32, that of qwen3_moe in float16."""
    graph = _half(model_type)
    assert run_pass("experts", graph).applied == (0, 1, 2)
    node = next(n for n in graph.graph if n.op_type == "MoE")
    assert {v.dtype for v in node.inputs if v is not None} == {ir.DataType.FLOAT16}
    assert node.attributes["normalize_routing_weights"].as_int() == 1


def test_no_operator_needs_cudnn() -> None:
    graph = _half("qwen3_moe")
    run_pass("experts", graph)
    assert "ReduceMax" not in {node.op_type for node in graph.graph}


def test_declines_features_that_do_not_fill_16_bytes_in_float16() -> None:
    graph = _half("mixtral", intermediate_size=100)
    report = run_pass("experts", graph)
    assert {(r.code, r.reason) for r in report.refusals} == {
        ("width", "in float16 the operator takes multiples of 8 features, here 64 and 100")
    }
    assert report.applied == ()
