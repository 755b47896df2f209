"""A layer of experts as MoE: counts, numbers of real architectures, and refusals."""

from functools import cache

import numpy as np
import onnx_ir as ir
import pytest

from llmc.config import Dtype
from llmc.graph import dialect
from llmc.graph.model import Graph
from llmc.graph.report import PassReport
from llmc.graph.serial import dump_graph, load_graph
from llmc.graph.verify import verify_graph
from llmc.graph.weights import ExpertRows, LazyWeight, WeightGroup
from llmc.passes import registered_passes
from llmc.trace import trace_model
from tests.models import build_tiny_model
from tests.state_store import StateStore, run_steps

LAYERS = 3
# Weights normalised after the choice, before it, and by a softmax after it; the last with biases and a limit.
MODELS = ("mixtral", "qwen3_moe", "gpt_oss")


@cache
def _traced(model_type: str) -> bytes:
    return dump_graph(trace_model(build_tiny_model(model_type).config, Dtype.FLOAT32))


def _graph(model_type: str) -> Graph:
    graph = load_graph(_traced(model_type))
    graph.bind(StateStore(build_tiny_model(model_type)), {})
    return graph


def _run(graph: Graph) -> PassReport:
    report = registered_passes()["experts"].run(graph)
    verify_graph(graph)
    return report


def _experts(graph: Graph) -> list[ir.Node]:
    return [n for n in graph.graph if n.op_type == dialect.EXPERTS]


@pytest.mark.parametrize("model_type", MODELS)
def test_lowering_keeps_the_numbers(model_type: str) -> None:
    ids = np.random.default_rng(0).integers(3, 250, (2, 18))
    mask, positions = np.ones_like(ids), np.tile(np.arange(18), (2, 1))
    graph = _graph(model_type)
    assert len(_experts(graph)) == LAYERS
    expected = run_steps(graph, ids, mask, positions, prompt=12)
    report = _run(graph)
    assert report.applied == (0, 1, 2)
    assert report.refusals == ()
    assert _experts(graph) == []
    assert [key for key in graph.model.functions if key[1] == dialect.EXPERTS] == []
    assert [n.op_type for n in graph.graph].count("MoE") == LAYERS
    np.testing.assert_allclose(run_steps(graph, ids, mask, positions, prompt=12), expected, atol=1e-4)


def test_declines_weights_that_may_be_negative() -> None:
    graph = _graph("mixtral")
    node = _experts(graph)[0]
    weights = node.inputs[2]
    assert weights is not None
    negated = ir.node("Neg", [weights])
    negated.outputs[0].name, negated.outputs[0].shape = "negated", weights.shape
    negated.outputs[0].type = weights.type
    graph.graph.insert_before(node, negated)
    node.replace_input_with(2, negated.outputs[0])
    report = _run(graph)
    assert [(r.code, r.layer) for r in report.refusals] == [("signed-weights", 0)]
    assert report.applied == (1, 2)
    assert len(_experts(graph)) == 1
    assert any(key[1] == dialect.EXPERTS for key in graph.model.functions)


def test_declines_experts_that_no_topk_chose() -> None:
    graph = _graph("mixtral")
    node = _experts(graph)[1]
    indices = node.inputs[1]
    assert indices is not None
    doubled = ir.node("Add", [indices, indices])
    doubled.outputs[0].name, doubled.outputs[0].shape = "doubled", indices.shape
    doubled.outputs[0].type = indices.type
    graph.graph.insert_before(node, doubled)
    node.replace_input_with(1, doubled.outputs[0])
    assert [(r.code, r.layer) for r in _run(graph).refusals] == [("routing", 1)]


def test_declines_computed_weights() -> None:
    graph = _graph("mixtral")
    down = _experts(graph)[2].inputs[4]
    assert down is not None
    data = np.zeros((4, 64, 96), np.float32)
    group = WeightGroup(("a",), lambda: {"value": data})
    down.const_value = LazyWeight(
        name=str(down.name), dtype=ir.DataType.FLOAT, shape=data.shape, group=group, key="value"
    )
    assert [(r.code, r.layer) for r in _run(graph).refusals] == [("computed", 2)]


def test_rows_of_experts() -> None:
    store = StateStore(build_tiny_model("gpt_oss"))
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
