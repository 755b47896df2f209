"""The passes for ONNX Runtime: how often they apply, what they leave, and that the numbers stay."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from transformers import PreTrainedModel

from llmc.config import Dtype
from llmc.graph.model import Graph
from llmc.graph.report import PassReport
from llmc.graph.serial import dump_graph, load_graph
from llmc.graph.verify import verify
from llmc.passes import registered_passes
from llmc.trace import trace_model
from tests.models import build_tiny_model
from tests.runtime import StateStore, run_steps

LAYERS = 3
ORDER = ("rms-norm", "layer-norm", "rotary", "group-query-attention", "pack-qkv", "pack-gate-up", "skip-norm")


@cache
def _model(model_type: str) -> PreTrainedModel:
    return build_tiny_model(model_type)


@cache
def _traced(model_type: str) -> bytes:
    return dump_graph(trace_model(_model(model_type).config, Dtype.FLOAT32))


def _lowered(model_type: str, last: str) -> tuple[Graph, Graph, PassReport]:
    """The graph before pass `last`, the one after it, and its report."""
    graphs = []
    for stop in (ORDER.index(last), ORDER.index(last) + 1):
        graph = load_graph(_traced(model_type))
        graph.bind(StateStore(_model(model_type)), {})
        for name in ORDER[:stop]:
            report = registered_passes()[name].run(graph)
            verify(graph)
        graphs.append(graph)
    return graphs[0], graphs[1], report


def _operators(graph: Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


@pytest.mark.parametrize(
    ("name", "model_type", "per_layer", "outside", "gone"),
    [
        ("rms-norm", "llama", 2, 1, "ReduceMean"),
        ("rms-norm", "gemma2", 4, 1, "ReduceMean"),
        ("rotary", "llama", 2, 0, "Neg"),
        ("group-query-attention", "llama", 1, 0, "CachedAttention"),
        ("group-query-attention", "gpt2", 1, 0, "CachedAttention"),
        ("pack-qkv", "llama", 1, 0, None),
        ("pack-qkv", "qwen2", 1, 0, None),
        ("pack-gate-up", "llama", 1, 0, None),
        ("pack-gate-up", "gemma2", 1, 0, None),
        ("skip-norm", "llama", None, None, None),
        ("skip-norm", "gpt2", None, None, None),
    ],
)
def test_pass_applies_everywhere_and_keeps_the_numbers(
    name: str, model_type: str, per_layer: int | None, outside: int | None, gone: str | None
) -> None:
    before, after, report = _lowered(model_type, name)
    assert report.refusals == ()
    if per_layer is not None:
        assert [report.in_layer(i) for i in range(LAYERS)] == [per_layer] * LAYERS
        assert report.applied.count(None) == outside
    if gone is not None:
        assert _operators(before)[gone]
        assert not _operators(after)[gone]
    random = np.random.default_rng(0)
    ids = random.integers(3, 250, (2, 18))
    mask = np.ones_like(ids)
    positions = np.tile(np.arange(18), (2, 1))
    expected = run_steps(before, ids, mask, positions, prompt=12)
    np.testing.assert_allclose(run_steps(after, ids, mask, positions, prompt=12), expected, atol=1e-4)


def test_packing_joins_products() -> None:
    before, after, _ = _lowered("llama", "pack-gate-up")
    unpacked = _lowered("llama", "pack-qkv")[0]
    assert _operators(unpacked)["MatMul"] == 7 * LAYERS + 1
    assert _operators(before)["MatMul"] == 5 * LAYERS + 1
    assert _operators(after)["MatMul"] == 4 * LAYERS + 1
    names = set(after.graph.initializers)
    assert "model.layers.0.self_attn.qkv_proj.weight" in names
    assert "model.layers.0.mlp.gate_up_proj.weight" in names
    assert "model.layers.0.self_attn.q_proj.weight" not in names


def test_biases_are_joined_with_the_weights() -> None:
    _, after, _ = _lowered("qwen2", "pack-qkv")
    bias = after.graph.initializers["model.layers.1.self_attn.qkv_proj.bias"].const_value
    assert bias is not None
    state = StateStore(_model("qwen2")).arrays
    parts = [state[f"model.layers.1.self_attn.{p}_proj.bias"] for p in "qkv"]
    np.testing.assert_array_equal(bias.numpy(), np.concatenate(parts))


def test_packing_declines_normalised_queries() -> None:
    _, _, report = _lowered("qwen3", "pack-qkv")
    assert report.applied == ()
    assert {r.code for r in report.refusals} == {"not-a-projection"}
    assert [r.layer for r in report.refusals] == [0, 1, 2]


def test_residual_sums_and_norms_are_one_operator() -> None:
    _, after, _ = _lowered("llama", "skip-norm")
    operators = _operators(after)
    assert operators["SkipSimplifiedLayerNormalization"] == 2 * LAYERS
    assert operators["SimplifiedLayerNormalization"] == 1
    assert not operators["Add"]


def test_logits_of_the_last_position() -> None:
    before, graph, _ = _lowered("llama", "skip-norm")
    report = registered_passes()["last-token-logits"].run(graph)
    verify(graph)
    assert report.applied == (None,)
    assert graph.logits == "last"
    assert graph.interface().outputs[0].shape == ("batch", 1, 256)
    ids = np.random.default_rng(0).integers(3, 250, (2, 9))
    mask, positions = np.ones_like(ids), np.tile(np.arange(9), (2, 1))
    expected = run_steps(before, ids, mask, positions, prompt=9)[:, -1:]
    np.testing.assert_allclose(run_steps(graph, ids, mask, positions, prompt=9), expected, atol=1e-5)


def test_keys_wider_than_values_stay_with_the_dialect() -> None:
    model = build_tiny_model("deepseek_v3", num_key_value_heads=4, v_head_dim=8)
    graph = trace_model(model.config, Dtype.FLOAT32)
    report = registered_passes()["group-query-attention"].run(graph)
    assert report.applied == ()
    assert {r.code for r in report.refusals} == {"value-width"}
