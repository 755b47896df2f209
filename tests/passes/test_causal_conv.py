"""CausalConv -> CausalConvWithState: the numbers of PyTorch, with rows padded on either side."""

import pytest

from llmc.config import Dtype
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.match import find_nodes
from llmc.graph.states import CAUSAL_CONV
from llmc.trace import trace_model
from tests.models import build_tiny_model
from tests.passes.harness import run_pass
from tests.state_store import StateStore
from tests.states import TYPES, difference


@pytest.mark.parametrize("model_type", ["lfm2", "mamba"])
def test_a_lowered_graph_has_the_models_numbers(model_type: str) -> None:
    overrides, counts = TYPES[model_type]
    model = build_tiny_model(model_type, **overrides)
    graph = trace_model(model.config, Dtype.FLOAT32)
    graph.bind(StateStore(model), {})
    report = run_pass("causal-conv", graph)
    assert report.refusals == ()
    assert len(report.applied) == counts[0]
    assert not find_nodes(graph.graph, CAUSAL_CONV, DIALECT)
    assert not [key for key in graph.model.functions if key[1] == CAUSAL_CONV]
    assert len(find_nodes(graph.graph, "CausalConvWithState", MICROSOFT)) == counts[0]
    for pad in ("", "left", "right"):
        assert difference(graph, model, pad) <= 1e-4, pad
