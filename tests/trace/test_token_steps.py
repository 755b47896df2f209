"""Layers that keep a state by code of their own: computed token by token, and held to PyTorch."""

import logging
import re
from typing import Any

import pytest

from llmc.config import Dtype
from llmc.errors import UnsupportedError
from llmc.graph.match import find_nodes
from llmc.graph.model import Graph, layer_of
from llmc.graph.recurrence import is_recurrence
from llmc.graph.serial import dump_graph, load_graph
from llmc.trace import trace_model
from tests.caches import traced_graph
from tests.models import build_tiny_model
from tests.state_store import StateStore
from tests.states import difference

#: Weights of products with what a module takes or returns.
PRODUCTS = re.compile(r"(_proj|output_gate|linear_\w|_proj_\w+)\.weight$")
#: Types, with the layers that keep states; each has a pair of them, as onnxruntime-genai serves them.
TYPES = {
    # A convolution and the value of the token before, beside attention, in a cache of transformers.
    "zaya": [0, 1, 2],
    # A state in a cache class of the model's own.
    "minimax": [1],
    # States in attributes of modules, of two modules in a layer, and positions.
    "recurrent_gemma": [0, 1],
}


@pytest.fixture(scope="module", params=TYPES)
def traced(request: pytest.FixtureRequest) -> tuple[str, Any, Graph]:
    model = build_tiny_model(request.param)
    return request.param, model, traced_graph(model.config, Dtype.FLOAT32)


def test_a_graph_has_the_numbers_of_one_pass(traced: tuple[str, Any, Graph]) -> None:
    name, model, graph = traced
    kept = [(layer, kind) for layer in TYPES[name] for kind in ("conv", "recurrent")]
    assert [(state.layer, state.kind) for state in graph.states] == kept
    assert graph.padding == "any"
    assert any("by code of their own, which is computed token by token" in note for note in graph.notes)
    bound = load_graph(dump_graph(graph))
    bound.bind(StateStore(model), {})
    for pad in ("", "left", "right"):
        assert difference(bound, model, pad) <= 1e-4, pad


def test_products_with_weights_are_computed_for_all_tokens_at_once(traced: tuple[str, Any, Graph]) -> None:
    _, _, graph = traced
    scanned = [node for node in graph.graph if is_recurrence(node)]
    assert scanned
    weights = {v.name for node in scanned for v in node.inputs if v is not None and v.is_initializer()}
    assert not [name for name in weights if name is not None and PRODUCTS.search(name)]
    layers = {layer_of(node) for node in scanned}
    products = {layer_of(node) for node in find_nodes(graph.graph, "MatMul")}
    assert layers <= products


def test_a_state_that_does_not_begin_with_zeros_is_refused() -> None:
    model = build_tiny_model("zaya", attention_bias=True)
    with pytest.raises(UnsupportedError, match=r"layer 0 keeps a state .*, which does not begin with zeros"):
        trace_model(model.config, Dtype.FLOAT32)


def test_modules_of_one_layer_have_states_and_nodes_of_their_own() -> None:
    # Four convolutions in a layer, two of them with weights that depend on the token.
    model = build_tiny_model("inkling2_text", num_hidden_layers=1, layer_types=["hybrid"])
    graph = trace_model(model.config, Dtype.FLOAT32)
    scanned = [node for node in graph.graph if is_recurrence(node)]
    assert len({node.name for node in scanned}) == len(scanned) == 4
    assert [(state.layer, state.kind) for state in graph.states] == [(0, "conv"), (0, "recurrent")]
    bound = load_graph(dump_graph(graph))
    bound.bind(StateStore(model), {})
    assert difference(bound, model, "") <= 1e-4


def test_a_failed_probe_says_so_in_the_error_alone(caplog: pytest.LogCaptureFixture) -> None:
    # transformers gives the state the width of the hidden size, which is another one here
    model = build_tiny_model("recurrent_gemma", lru_width=96)
    caplog.handler.setLevel(logging.WARNING)
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    with pytest.raises(UnsupportedError, match=r"outside of the cache; .* cannot be traced: its code fails"):
        trace_model(model.config, Dtype.FLOAT32)
    logger.removeHandler(caplog.handler)
    assert caplog.messages == []
