"""Convolutions and recurrences that keep a state: traced, lowered, and held to PyTorch."""

from typing import Any

import pytest
import transformers

from llmc.config import Dtype
from llmc.errors import UnsupportedError
from llmc.graph import states
from llmc.graph.domains import DIALECT
from llmc.graph.match import find_nodes
from llmc.graph.model import Graph
from llmc.graph.serial import dump_graph, load_graph
from llmc.trace import trace_model
from llmc.trace.kernels import kernel_name
from tests.caches import traced_graph
from tests.models import build_tiny_model
from tests.state_store import StateStore
from tests.states import FULL, LINEAR, TYPES, difference


@pytest.fixture(scope="module", params=TYPES)
def traced(request: pytest.FixtureRequest) -> tuple[str, Any, Graph]:
    model = build_tiny_model(request.param, **TYPES[request.param][0])
    return request.param, model, traced_graph(model.config, Dtype.FLOAT32)


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
        assert difference(bound, model, pad) <= 1e-4, pad


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
