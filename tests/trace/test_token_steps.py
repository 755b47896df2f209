"""Layers that keep a state by code of their own: computed token by token, and held to PyTorch."""

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import pytest

from llmc.config import Dtype
from llmc.graph.match import find_nodes
from llmc.graph.model import Graph
from llmc.graph.recurrence import is_recurrence
from llmc.graph.serial import dump_graph, load_graph
from llmc.trace import trace_model
from tests.models import build_tiny_model
from tests.state_store import StateStore
from tests.states import difference

#: Types, with the states of their layers: kinds by layer.
TYPES = {
    # A convolution and the value of the token before, beside attention, in a cache of transformers.
    "zaya": [(layer, kind) for layer in range(3) for kind in ("conv", "recurrent")],
}


@pytest.fixture(scope="module", params=TYPES)
def traced(request: pytest.FixtureRequest) -> tuple[str, Any, Graph]:
    model = build_tiny_model(request.param)
    return request.param, model, trace_model(model.config, Dtype.FLOAT32)


def test_a_graph_has_the_numbers_of_one_pass(traced: tuple[str, Any, Graph]) -> None:
    name, model, graph = traced
    assert [(state.layer, state.kind) for state in graph.states] == TYPES[name]
    assert graph.padding == "any"
    assert any("by code of their own, which is computed token by token" in note for note in graph.notes)
    bound = load_graph(dump_graph(graph))
    bound.bind(StateStore(model), {})
    for pad in ("", "left", "right"):
        assert difference(bound, model, pad) <= 1e-4, pad


def _scanned(graph: Graph) -> Iterator[ir.Node]:
    """Yield the nodes that run once for each token."""
    for function in graph.model.functions.values():
        for scan in (node for node in function if node.op_type == "Scan"):
            yield from scan.attributes["body"].as_graph()


def test_products_with_weights_are_computed_for_all_tokens_at_once(traced: tuple[str, Any, Graph]) -> None:
    name, model, graph = traced
    shapes = {value.name: value.shape for value in graph.graph.initializers.values()}
    inside = {v.name for n in graph.graph if is_recurrence(n) for v in n.inputs if v is not None}
    assert not [name for name in inside & set(shapes) if name.endswith("_proj.weight")]
    assert "Scan" in {n.op_type for f in graph.model.functions.values() for n in f}
    assert "MatMul" not in {node.op_type for node in _scanned(graph)} or name != "zaya"
    assert len(find_nodes(graph.graph, "MatMul")) > 4 * len(model.config.layer_types)
