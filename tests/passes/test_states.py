"""States -> CausalConvWithState and LinearAttention: the numbers of PyTorch, rows padded on either side."""

import pytest

from llmc.config import Dtype
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.match import find_nodes
from llmc.graph.serial import load_graph
from llmc.graph.states import CAUSAL_CONV, LINEAR_ATTENTION
from tests.caches import shared_trace
from tests.models import build_tiny_model
from tests.passes.harness import run_pass
from tests.state_store import StateStore
from tests.states import TYPES, difference


@pytest.mark.parametrize("model_type", ["lfm2", "mamba", "qwen3_next", "zamba"])
def test_a_lowered_graph_has_the_models_numbers(model_type: str) -> None:
    overrides, (convolutions, recurrences, _) = TYPES[model_type]
    model = build_tiny_model(model_type, **overrides)
    graph = load_graph(shared_trace(model.config, Dtype.FLOAT32))
    graph.bind(StateStore(model), {})
    report = run_pass("states", graph)
    assert report.refusals == ()
    assert len(report.applied) == convolutions + recurrences
    assert not [key for key in graph.model.functions if key[1] in (CAUSAL_CONV, LINEAR_ATTENTION)]
    assert not [
        n for n in graph.graph if n.domain == DIALECT and n.op_type in (CAUSAL_CONV, LINEAR_ATTENTION)
    ]
    assert len(find_nodes(graph.graph, "CausalConvWithState", MICROSOFT)) == convolutions
    assert len(find_nodes(graph.graph, "LinearAttention", MICROSOFT)) == recurrences
    for pad in ("", "left", "right"):
        assert difference(graph, model, pad) <= 1e-4, pad
