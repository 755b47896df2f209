"""The passes for ONNX Runtime: how often they apply, what they leave, and that the numbers stay."""

from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
from transformers import PreTrainedModel

from llmc.config import Dtype, WeightRole
from llmc.graph.linear import find_linears
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport
from llmc.graph.serial import dump_graph, load_graph
from llmc.graph.verify import verify_graph
from llmc.passes import registered_passes
from llmc.passes._norms import Norm, match_norm, squared
from llmc.trace import trace_model
from tests.models import build_tiny_model
from tests.state_store import StateStore, run_steps

LAYERS = 3
ORDER = (
    "linear",
    "rms-norm",
    "layer-norm",
    "rotary",
    "group-query-attention",
    "pack-qkv",
    "pack-gate-up",
    "skip-norm",
    "activation",
)


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
            verify_graph(graph)
        graphs.append(graph)
    return graphs[0], graphs[1], report


def _operators(graph: Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


@pytest.mark.parametrize(
    ("name", "model_type", "per_layer", "outside", "gone"),
    [
        ("linear", "gpt2", 4, 0, "Gemm"),
        ("linear", "opt", 2, 0, "Gemm"),
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
        ("activation", "llama", 1, 0, "Sigmoid"),
        ("activation", "gpt2", 1, 0, "Tanh"),
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


def test_products_of_rows_lose_their_reshapes() -> None:
    _, after, _ = _lowered("gpt2", "linear")
    linears = [linear for linear in find_linears(after) if linear.role is not WeightRole.LM_HEAD]
    assert len(linears) == 4 * LAYERS
    assert all(len(linear.output.shape or ()) == 3 for linear in linears)


def _prepared(model_type: str, before: str) -> Graph:
    """The traced graph with the passes that come before `before`."""
    return _lowered(model_type, before)[0]


def _in_layer(graph: Graph, op: str, layer: int = 1) -> ir.Node:
    return next(n for n in graph.graph if n.op_type == op and layer_of(n) == layer)


def _copy_of(graph: Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    """The same value by another name."""
    node = ir.Node("", "Identity", [value], num_outputs=1, name=f"{value.name}/again")
    node.outputs[0].name = f"{value.name}/copy"
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    graph.graph.insert_before(before, node)
    return node.outputs[0]


def _scale_gemm(graph: Graph) -> None:
    _in_layer(graph, "Gemm").attributes["alpha"] = ir.AttrFloat32("alpha", 2.0)


def _scale_another_tensor(graph: Graph) -> None:
    """The first norm of layer 1 scales a copy of what it takes the mean square of."""
    mean = next(
        n for n in graph.graph if n.op_type == "ReduceMean" and layer_of(n) == 1 and squared(n.inputs[0])
    )
    norm = match_norm(mean)
    assert isinstance(norm, Norm)
    x = squared(mean.inputs[0])
    assert x is not None
    for user, index in list(x.uses()):
        if user.op_type in ("Mul", "Div") and user.inputs[0] is not user.inputs[1]:
            user.replace_input_with(index, _copy_of(graph, x, user))


def _turn_by_the_mask(graph: Graph) -> None:
    inputs = {str(v.name): v for v in graph.graph.inputs}
    ir.convenience.replace_all_uses_with(inputs["position_ids"], inputs["attention_mask"])


def _feed_up_with_a_copy(graph: Graph) -> None:
    gate = _in_layer(graph, "Sigmoid").inputs[0]
    activation = gate.producer().inputs[0]  # type: ignore[union-attr]
    up = next(n for n, _ in activation.uses() if n.op_type == "MatMul" and n is not gate.producer())  # type: ignore[union-attr]
    up.replace_input_with(0, _copy_of(graph, activation, up))  # type: ignore[arg-type]


def _add_a_vector(graph: Graph) -> None:
    norm = _in_layer(graph, "SimplifiedLayerNormalization")
    total = norm.inputs[0].producer()  # type: ignore[union-attr]
    assert total is not None
    assert total.op_type == "Add"
    total.replace_input_with(1, norm.inputs[1])


@pytest.mark.parametrize(
    ("name", "model_type", "spoil", "code", "kept"),
    [
        ("linear", "gpt2", _scale_gemm, "gemm-scale", "Gemm"),
        ("rms-norm", "llama", _scale_another_tensor, "norm-form", "ReduceMean"),
        ("layer-norm", "cohere", _scale_another_tensor, "norm-form", "ReduceMean"),
        ("rotary", "llama", _turn_by_the_mask, "rotary-positions", "Neg"),
        ("pack-gate-up", "llama", _feed_up_with_a_copy, "activation", "Sigmoid"),
        ("skip-norm", "llama", _add_a_vector, "broadcast", "SimplifiedLayerNormalization"),
    ],
)
def test_pass_declines_with_a_reason(
    name: str, model_type: str, spoil: Callable[[Graph], None], code: str, kept: str
) -> None:
    graph = _prepared(model_type, name)
    spoil(graph)
    report = registered_passes()[name].run(graph)
    assert {(r.code, r.layer) for r in report.refusals} >= {(code, 1)}
    assert all(r.reason and r.node for r in report.refusals)
    assert _in_layer(graph, kept) is not None


def test_a_sigmoid_of_something_else_is_no_silu() -> None:
    graph = _prepared("llama", "activation")
    sigmoid = _in_layer(graph, "Sigmoid")
    assert sigmoid.inputs[0] is not None
    sigmoid.replace_input_with(0, _copy_of(graph, sigmoid.inputs[0], sigmoid))
    report = registered_passes()["activation"].run(graph)
    assert [report.in_layer(i) for i in range(LAYERS)] == [1, 0, 1]


def test_residual_sums_and_norms_are_one_operator() -> None:
    _, after, _ = _lowered("llama", "skip-norm")
    operators = _operators(after)
    assert operators["SkipSimplifiedLayerNormalization"] == 2 * LAYERS
    assert operators["SimplifiedLayerNormalization"] == 1
    assert not operators["Add"]


def test_logits_of_each_rows_last_token() -> None:
    before, graph, _ = _lowered("llama", "skip-norm")
    report = registered_passes()["last-token-logits"].run(graph)
    verify_graph(graph)
    assert report.applied == (None,)
    assert graph.logits == "last"
    assert graph.interface().outputs[0].shape == ("batch", 1, 256)
    ids = np.random.default_rng(0).integers(3, 250, (2, 9))
    mask, positions = np.ones_like(ids), np.tile(np.arange(9), (2, 1))
    mask[1, 6:] = 0  # the second row ends before the last slot
    every = run_steps(before, ids, mask, positions, prompt=9)
    expected = np.stack([every[0, 8:], every[1, 5:6]])
    np.testing.assert_allclose(run_steps(graph, ids, mask, positions, prompt=9), expected, atol=1e-5)


def test_keys_wider_than_values_stay_with_the_dialect() -> None:
    model = build_tiny_model("deepseek_v3", v_head_dim=8)
    graph = trace_model(model.config, Dtype.FLOAT32)
    report = registered_passes()["group-query-attention"].run(graph)
    assert report.applied == ()
    assert {r.code for r in report.refusals} == {"value-width"}


def _latent(**overrides: int) -> tuple[PreTrainedModel, Graph]:
    model = build_tiny_model("deepseek_v3", **overrides)
    graph = trace_model(model.config, Dtype.FLOAT32)
    graph.bind(StateStore(model), {})
    return model, graph


def test_values_are_as_wide_as_keys_and_the_numbers_stay() -> None:
    _, graph = _latent(v_head_dim=8)
    ids = np.random.default_rng(0).integers(3, 250, (2, 9))
    mask, positions = np.ones_like(ids), np.tile(np.arange(9), (2, 1))
    expected = run_steps(graph, ids, mask, positions, prompt=5)
    assert {(s.key_width, s.value_width) for s in graph.cache} == {(32, 8)}
    report = registered_passes()["equal-widths"].run(graph)
    verify_graph(graph)
    assert report.applied == (0, 1, 2)
    assert report.refusals == ()
    assert {(s.key_width, s.value_width) for s in graph.cache} == {(32, 32)}
    np.testing.assert_allclose(run_steps(graph, ids, mask, positions, prompt=5), expected, atol=1e-5)
    report = registered_passes()["group-query-attention"].run(graph)
    verify_graph(graph)
    assert report.applied == (0, 1, 2)
    assert not _operators(graph)["CachedAttention"]
    np.testing.assert_allclose(run_steps(graph, ids, mask, positions, prompt=5), expected, atol=1e-5)


def test_keys_narrower_than_values_are_declined() -> None:
    _, graph = _latent(v_head_dim=40)
    report = registered_passes()["equal-widths"].run(graph)
    assert report.applied == ()
    assert {(r.code, r.layer) for r in report.refusals} == {("narrow-keys", n) for n in range(LAYERS)}
    assert {s.value_width for s in graph.cache} == {40}


def test_attention_in_plain_operators_is_declined_layer_by_layer() -> None:
    graph = trace_model(build_tiny_model("bloom").config, Dtype.FLOAT32)
    report = registered_passes()["group-query-attention"].run(graph)
    assert report.applied == ()
    assert {(r.code, r.layer) for r in report.refusals} == {("plain-attention", n) for n in range(LAYERS)}
    assert graph.padding == "any"
