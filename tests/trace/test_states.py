"""Convolutions and recurrences that keep a state: traced, lowered, and held to PyTorch."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmc.config import Dtype
from llmc.errors import UnsupportedError
from llmc.graph import states
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.match import find_nodes
from llmc.graph.model import Graph
from llmc.graph.serial import dump_graph, load_graph
from llmc.graph.verify import verify_graph
from llmc.passes import registered_passes
from llmc.trace import trace_model
from llmc.trace.kernels import kernel_name
from tests.models import build_tiny_model
from tests.state_store import StateStore, run_steps

LINEAR, FULL, CONV = "linear_attention", "full_attention", "conv"
#: A type for each kind of layer: overrides of its tiny config; convolutions, recurrences and attentions.
TYPES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    # The delta rule with fewer keys than values, and attention.
    "qwen3_next": ({"num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL]}, (2, 2, 2)),
    # Convolutions alone, and attention.
    "lfm2": ({"num_hidden_layers": 4, "layer_types": [CONV, FULL, CONV, FULL]}, (2, 0, 2)),
    # A decay per channel, no attention, and no mask of transformers' own.
    "mamba": ({"state_size": 8, "time_step_rank": 8}, (3, 3, 0)),
    # Two mixers in a layer, and groups of keys.
    "falcon_h1": (
        {
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
        },
        (3, 3, 3),
    ),
    # Layers without a mixer.
    "nemotron_h": (
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "mamba", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
        },
        (2, 2, 1),
    ),
    # The delta rule with a decay per channel.
    "kimi_linear": ({"num_hidden_layers": 2, "layer_types": [LINEAR, FULL]}, (1, 1, 1)),
}
PASSES = ("causal-conv", "linear-attention")
REAL = 12


@pytest.fixture(scope="module", params=TYPES)
def traced(request: pytest.FixtureRequest) -> tuple[str, Any, Graph]:
    model = build_tiny_model(request.param, **TYPES[request.param][0])
    return request.param, model, trace_model(model.config, Dtype.FLOAT32)


def _expected(model: Any, ids: np.ndarray) -> np.ndarray:
    """One pass of the original over each row alone."""
    with torch.inference_mode():
        return np.concatenate([model(input_ids=torch.from_numpy(row[None])).logits.numpy() for row in ids])


def _difference(graph: Graph, model: Any, pad: str) -> float:
    """The largest difference of a prompt and of steps after it, for two rows of which one is padded."""
    ids = np.random.default_rng(0).integers(3, 250, (2, REAL + 4))
    expected = _expected(model, ids)
    given, mask = ids.copy(), np.ones_like(ids)
    real = [slice(0, REAL), slice(0, REAL)]
    short = REAL - 5
    if pad == "left":
        given[1, 5:REAL], mask[1, :5], real[1] = ids[1, :short], 0, slice(5, REAL)
    elif pad == "right":
        given[1, short:REAL], mask[1, short:REAL], real[1] = 0, 0, slice(0, short)
    given[1, REAL:] = ids[1, short : short + 4] if pad else ids[1, REAL:]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    found = run_steps(graph, given, mask, positions, prompt=REAL)
    length = short if pad else REAL
    return max(
        float(np.abs(found[0] - expected[0]).max()),
        float(np.abs(found[1, real[1]] - expected[1, :length]).max()),
        float(np.abs(found[1, REAL:] - expected[1, length : length + 4]).max()),
    )


def test_a_canonical_graph_has_the_numbers_of_one_pass(traced: tuple[str, Any, Graph]) -> None:
    name, model, graph = traced
    found = [find_nodes(graph.graph, op, DIALECT) for op in (states.CAUSAL_CONV, states.LINEAR_ATTENTION)]
    assert (*map(len, found), len(graph.cache)) == TYPES[name][1]
    assert len(graph.states) == sum(map(len, found))
    assert graph.padding == "any"
    assert not any("as the model computes it" in note for note in graph.notes)
    bound = load_graph(dump_graph(graph))
    assert bound.states == graph.states
    bound.bind(StateStore(model), {})
    for pad in ("", "left", "right"):
        assert _difference(bound, model, pad) <= 1e-4, pad


def test_a_lowered_graph_has_the_same_numbers(traced: tuple[str, Any, Graph]) -> None:
    name, model, graph = traced
    lowered = load_graph(dump_graph(graph))
    lowered.bind(StateStore(model), {})
    reports = []
    for each in PASSES:
        reports.append(registered_passes()[each].run(lowered))
        verify_graph(lowered)
    assert tuple(len(report.applied) for report in reports) == TYPES[name][1][:2]
    assert not find_nodes(lowered.graph, states.CAUSAL_CONV, DIALECT)
    fused = [
        len(find_nodes(lowered.graph, op, MICROSOFT)) for op in ("CausalConvWithState", "LinearAttention")
    ]
    assert tuple(fused) == TYPES[name][1][:2]
    for pad in ("", "left", "right"):
        assert _difference(lowered, model, pad) <= 1e-4, pad


def test_kernels_are_found_by_the_name_that_transformers_gives_them() -> None:
    module = transformers.models.qwen3_next.modeling_qwen3_next
    assert kernel_name(module.torch_chunk_gated_delta_rule) == "chunk_gated_delta_rule"
    assert kernel_name(module.causal_conv1d_fn) == "causal_conv1d_fn"
    assert kernel_name(transformers.models.lfm3.modeling_lfm3.causal_conv1d_fn) == "causal_conv1d_fn"
    assert kernel_name(3) is None


def _small() -> Any:
    return build_tiny_model("qwen3_next", num_hidden_layers=2, layer_types=[FULL, LINEAR]).config


def test_a_kernel_with_an_argument_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformers.models.qwen3_next.modeling_qwen3_next
    mixer = module.Qwen3NextGatedDeltaNet
    forward = mixer.forward

    def chunk_gated_delta_rule(*args: Any, gate: float | None = None, **kwargs: Any) -> Any:
        raise AssertionError("the hook is called instead")

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", chunk_gated_delta_rule)
    monkeypatch.setattr(mixer, "forward", lambda self, *a, **k: forward(self, *a, gate=0.5, **k))
    with pytest.raises(UnsupportedError, match="chunk_gated_delta_rule is called with gate"):
        trace_model(_small(), Dtype.FLOAT32)


def test_a_state_that_no_kernel_computes_names_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformers.models.qwen3_next.modeling_qwen3_next

    def own_code(query: Any, key: Any, value: Any, **_: Any) -> Any:
        return value, key.sum()

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", own_code)
    with pytest.raises(UnsupportedError, match="layer 1 keeps a recurrent state that no known kernel"):
        trace_model(_small(), Dtype.FLOAT32)
