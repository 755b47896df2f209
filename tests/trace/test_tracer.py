"""Canonical graphs against the PyTorch models they were traced from, in ONNX Runtime."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from llmc.architecture import beside_language_model, language_model
from llmc.checkpoint.skeleton import build_skeleton
from llmc.config import Dtype
from llmc.errors import UnsupportedError
from llmc.graph import dialect
from llmc.graph.domains import DIALECT
from llmc.graph.model import LAYER, SCOPES, Graph, Placeholder, layer_of
from llmc.trace import capture, trace_model
from llmc.trace.layer_index import LayerIndex
from llmc.trace.positions import first_position
from llmc.trace.stamp import NotStampableError, check_indices
from tests.caches import traced_graph
from tests.models import build_tiny_model, tiny_config, tiny_multimodal_fields
from tests.state_store import StateStore, run_steps


def _compare(model_type: str, **overrides: Any) -> float:
    return _trace_and_compare(model_type, **overrides)[1]


def _trace_and_compare(model_type: str, **overrides: Any) -> tuple[Graph, float]:
    """The graph, and the largest difference of logits at real tokens.

    A prefill of 10 tokens, padded on the left, is followed by 10 decode steps.
    """
    model = build_tiny_model(model_type, **overrides)
    model.set_attn_implementation("eager")
    graph = traced_graph(model.config, Dtype.FLOAT32)
    towers = beside_language_model(model, list(model.state_dict()))
    assert set(graph.bind(StateStore(model), {})) == {name for names in towers.values() for name in names}
    random = np.random.default_rng(0)
    ids = random.integers(3, 250, (2, 20))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    positions = np.clip(mask.cumsum(1) - 1, 0, None)
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    found = run_steps(graph, ids, mask, positions, prompt=10)
    return graph, float(np.abs(found - expected)[mask == 1].max())


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gemma2", "gemma3_text", "gpt2", "falcon", "mixtral", "gpt_oss", "jetmoe"],
)
def test_canonical_graph_has_the_models_numbers(model_type: str) -> None:
    # softcap and window, two kinds of layers, learned positions, torch's own attention call, experts, sinks,
    # rows split by expert
    assert _compare(model_type) <= 1e-4


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt_neo", "exchangeable attention"),
        ("bloom", "cannot be traced"),
        ("diffllama", "runs twice in one step"),
    ],
)
def test_attention_that_cannot_be_captured_is_traced_as_the_model_computes_it(
    model_type: str, reason: str
) -> None:
    graph = traced_graph(tiny_config(model_type), Dtype.FLOAT32)
    assert any(reason in note for note in graph.notes)
    assert not [n for n in graph.graph if n.domain == DIALECT]
    assert [s.layer for s in graph.cache] == [0, 1, 2]
    assert _compare(model_type) <= 1e-4


@pytest.mark.parametrize(
    ("model_type", "padding", "positions"),
    [
        ("llama", "any", 256),
        ("bart", "none", None),  # positions are slots of the cache
        ("gpt_neo", "left", 256),  # a window counts slots
        ("bloom", "any", None),  # biases follow the mask
        ("roberta", "any", 255),  # the first row of the table is padding's
    ],
)
def test_padding_and_positions_are_read_off_the_graph(
    model_type: str, padding: str, positions: int | None
) -> None:
    graph = traced_graph(tiny_config(model_type), Dtype.FLOAT32)
    assert graph.padding == padding
    assert positions is None or graph.max_length == positions


@pytest.mark.parametrize(("model_type", "padding"), [("mistral", "left"), ("llama", "any")])
def test_a_window_in_plain_operators_counts_slots(
    monkeypatch: pytest.MonkeyPatch, model_type: str, padding: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedError("not captured")

    monkeypatch.setattr(capture.Capture, "layer_of_call", refuse)
    assert trace_model(tiny_config(model_type), Dtype.FLOAT32).padding == padding


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "llava", "gemma3"])
def test_a_multimodal_model_is_traced_from_text_alone(model_type: str) -> None:
    graph, difference = _trace_and_compare(model_type, **tiny_multimodal_fields(model_type))
    assert difference <= 1e-4
    assert (graph.padding, len(graph.cache)) == ("any", 3)  # the tower's layers are not the decoder's


def test_a_mask_that_a_multimodal_model_prepares_is_captured() -> None:
    graph, difference = _trace_and_compare("paligemma")
    assert difference <= 1e-4
    assert sum(n.op_type == dialect.CACHED_ATTENTION for n in graph.graph) == len(graph.cache)


#: Tiny models with chunks, shared keys and values, and complex rotations.
SHARED = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "intermediate_size": 96,
    "activation_sparsity_pattern": [0.0] * 6,
    "num_kv_shared_layers": 4,  # read what the first two layers stored; two of them are stamped
}
CHUNKED = {
    "attention_chunk_size": 4,
    "attn_temperature_tuning": False,
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    "no_rope_layers": [1, 0, 1],
    "intermediate_size_mlp": 96,
    "moe_layers": [],
}


@pytest.mark.parametrize(
    ("model_type", "overrides"), [("gemma3n_text", SHARED), ("llama4_text", CHUNKED), ("deepseek_v2", {})]
)
def test_shared_keys_chunks_and_complex_rotations(model_type: str, overrides: dict[str, Any]) -> None:
    graph, difference = _trace_and_compare(model_type, **overrides)
    assert difference <= 1e-4
    assert (graph.padding, graph.notes) == ("any", [])
    attention = [n for n in graph.graph if n.op_type == dialect.CACHED_ATTENTION]
    owners = [n for n in attention if n.outputs[1].is_graph_output()]
    assert len(owners) == len(graph.cache) == len(attention) - overrides.get("num_kv_shared_layers", 0)
    assert {n.inputs[3] for n in attention} == {n.inputs[3] for n in owners}
    chunks = [n.attributes["chunk"].as_int() for n in attention]
    assert chunks == ([4, 0, 4] if model_type == "llama4_text" else [0] * len(attention))
    if any(chunks):
        assert [slot.window for slot in graph.cache] == [4, None, 4]


@pytest.mark.parametrize(("model_type", "overrides"), [("mistral", {}), ("llama4_text", CHUNKED)])
def test_windows_and_chunks_count_real_tokens_wherever_the_padding_is(
    model_type: str, overrides: dict[str, Any]
) -> None:
    """The same row padded on the left, in the middle of its prompt and on the right has the same logits."""
    model = build_tiny_model(model_type, **overrides)
    graph = traced_graph(model.config, Dtype.FLOAT32)
    graph.bind(StateStore(model), {})
    real = np.random.default_rng(0).integers(3, 250, 17)
    mask = np.ones((4, 21), np.int64)
    for row, hidden in enumerate((range(4), range(2, 6), range(8, 12), range(11, 15))):
        mask[row, hidden] = 0
    ids = np.zeros_like(mask)
    ids[mask == 1] = np.tile(real, 4)
    positions = np.clip(mask.cumsum(1) - 1, 0, None)
    found = run_steps(graph, ids, mask, positions, prompt=12)
    rows = [logits[kept == 1] for logits, kept in zip(found, mask, strict=True)]
    for row in rows[1:]:
        np.testing.assert_allclose(row, rows[0], atol=1e-4)


def test_a_layer_that_runs_several_times_has_a_slot_for_each_run() -> None:
    graph, difference = _trace_and_compare("hrm_text", num_hidden_layers=1, H_cycles=1, L_cycles=2)
    assert difference <= 1e-4
    assert [slot.layer for slot in graph.cache] == [0, 1, 2]
    assert sum(n.op_type == dialect.CACHED_ATTENTION for n in graph.graph) == 3
    assert graph.notes == ["traced layer by layer: layer 0 runs several times in one step"]


def test_experts_in_a_loop_are_dense_products() -> None:
    graph, difference = _trace_and_compare("dbrx")
    assert difference <= 1e-4
    assert graph.padding == "any"
    assert any("their code loops over the experts" in note for note in graph.notes)


@pytest.mark.parametrize(("model_type", "first"), [("llama", 0), ("roberta", 1), ("kosmos-2.5", 1)])
def test_positions_begin_after_the_padding_of_their_table(model_type: str, first: int) -> None:
    model = build_skeleton(tiny_config(model_type))
    assert first_position(model) == first


def test_a_head_called_decoder_is_not_the_language_model() -> None:
    model = build_skeleton(tiny_config("modernbert-decoder"))
    assert language_model(model) is model.model


def test_sinks_of_some_layers_are_sinks_of_all_that_draw_nothing() -> None:
    assert _compare("mimo_v2_flash") <= 1e-4


def test_keys_wider_than_values() -> None:
    assert _compare("deepseek_v3") <= 1e-4


def _structure(graph: Graph) -> list[tuple[Any, ...]]:
    """Nodes with constants by value and computed values by order of appearance."""
    numbers: dict[ir.Value, int] = {}

    def describe(value: ir.Value | None) -> Any:
        if value is None:
            return None
        if value.producer() is not None:
            return numbers[value]
        tensor = value.const_value
        if tensor is None or isinstance(tensor, Placeholder):
            return value.name, str(value.shape)
        return tensor.numpy().dtype.str, tensor.numpy().shape, tensor.numpy().tobytes()

    nodes = []
    for node in graph.graph:
        inputs = tuple(describe(v) for v in node.inputs)
        attributes = tuple(sorted((n, str(a.value)) for n, a in node.attributes.items()))
        for output in node.outputs:
            numbers[output] = len(numbers)
        shapes = tuple(str(o.shape) for o in node.outputs)
        nodes.append((node.domain, node.op_type, inputs, attributes, layer_of(node), shapes))
    return nodes


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {"num_hidden_layers": 6}),
        (
            "gemma3_text",
            {"num_hidden_layers": 6, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2},
        ),
        ("smollm3", {"num_hidden_layers": 6, "no_rope_layers": [1, 1, 0] * 2}),
        ("qwen3_moe", {"num_hidden_layers": 4}),
        ("gpt2", {"n_layer": 4}),
    ],
)
def test_stamped_graph_equals_the_fully_traced_one(model_type: str, overrides: dict[str, Any]) -> None:
    config = tiny_config(model_type, **overrides)
    stamped = trace_model(config, Dtype.FLOAT32)
    assert stamped.notes == []
    assert _structure(stamped) == _structure(trace_model(config, Dtype.FLOAT32, stamp=False))


def test_layers_with_attributes_of_their_own_are_of_their_own_kind() -> None:
    config = tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True)
    graph = trace_model(config, Dtype.FLOAT32)
    scales = {n.attributes["scale"].as_float() for n in graph.graph if n.op_type == dialect.CACHED_ATTENTION}
    assert len(scales) == config.num_hidden_layers


@pytest.mark.parametrize("compute", [lambda i: i + 1, lambda i: 2 * i, lambda i: i % 2, lambda i: i < 2])
def test_computing_with_a_layers_index_is_noticed(compute: Callable[[int], object]) -> None:
    LayerIndex.computed.clear()
    index = LayerIndex(3)
    assert [10, 11, 12, 13][index] == 13
    check_indices()
    assert compute(index) == compute(3)
    with pytest.raises(NotStampableError, match="computes with its layer index"):
        check_indices()


def test_every_attention_is_one_node_with_its_geometry() -> None:
    graph = trace_model(tiny_config("gemma2", num_hidden_layers=4), Dtype.FLOAT32)
    attention = [n for n in graph.graph if n.op_type == dialect.CACHED_ATTENTION]
    assert [layer_of(n) for n in attention] == [0, 1, 2, 3]
    assert [slot.window for slot in graph.cache] == [8, None, 8, None]
    assert {n.attributes["softcap"].as_float() for n in attention} == {50.0}
    assert not [n for n in graph.graph if n.op_type == "Softmax"]


def test_nothing_of_the_machine_that_traces_is_left() -> None:
    graph = trace_model(tiny_config("qwen3_moe"), Dtype.FLOAT32)
    nodes = list(graph.model.graph.all_nodes())
    assert {key for node in nodes for key in node.metadata_props} == {LAYER, SCOPES}
    values = [*graph.graph.inputs, *graph.graph.initializers.values(), *(v for n in nodes for v in n.outputs)]
    assert not any(value.metadata_props for value in values)
    assert not graph.graph.metadata_props
    assert not any(node.doc_string for node in nodes)


def test_positions_are_an_input_only_where_the_model_reads_them() -> None:
    assert traced_graph(tiny_config("llama"), Dtype.FLOAT32).interface().position_ids
    config = tiny_config("smollm3", no_rope_layers=[0, 0, 0])
    assert not trace_model(config, Dtype.FLOAT32).interface().position_ids


def test_a_layer_that_runs_twice_has_a_slot_for_each_run() -> None:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    graph, difference = _trace_and_compare("dory", num_hidden_layers=3, layer_types=layers)
    assert difference <= 1e-4
    assert [(slot.layer, slot.window) for slot in graph.cache] == [(0, 8), (1, None), (2, 8), (3, None)]


def test_half_precision_is_traced_as_such() -> None:
    graph = traced_graph(tiny_config("llama"), Dtype.FLOAT16)
    interface = graph.interface()
    assert {s.dtype for s in interface.outputs} == {"float16"}
    assert {v.dtype for v in graph.unbound()} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("openai-gpt", "OpenAIGPTLMHeadModel takes no cache"),
        ("qwen4_exp_text", "reads indexer_position_ids of layer 3 of its cache itself"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(model_type: str, message: str) -> None:
    config = tiny_config(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedError, match=message):
            trace_model(config, Dtype.FLOAT32)


def test_tracing_leaves_torch_and_transformers_as_they_were() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = torch.nn.functional.scaled_dot_product_attention, ALL_ATTENTION_FUNCTIONS["sdpa"]
    trace_model(tiny_config("falcon"), Dtype.FLOAT32)
    assert (torch.nn.functional.scaled_dot_product_attention, ALL_ATTENTION_FUNCTIONS["sdpa"]) == before


def test_a_layer_that_mixes_tokens_by_its_own_code_is_refused_by_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = LlamaAttention.forward

    def own_code(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if self.layer_idx != 1:
            return original(self, hidden_states, **kwargs)
        weights = torch.softmax(hidden_states @ hidden_states.transpose(1, 2), dim=-1)
        return weights @ hidden_states, None

    monkeypatch.setattr(LlamaAttention, "forward", own_code)
    with pytest.raises(UnsupportedError, match="layers 1 mix tokens by code of their own"):
        trace_model(tiny_config("llama"), Dtype.FLOAT32, stamp=False)
