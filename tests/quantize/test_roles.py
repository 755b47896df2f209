"""What each matrix is for, read off the graph after the passes of a target."""

from collections import Counter

import pytest

from llmc.catalog import load_target
from llmc.config import Dtype, WeightRole
from llmc.graph.linear import find_linears
from llmc.graph.model import Graph
from llmc.graph.serial import load_graph
from llmc.passes import run_passes
from tests.caches import shared_trace
from tests.models import build_tiny_model
from tests.state_store import StateStore

LAYERS = 3


def _roles(graph: Graph) -> Counter[WeightRole]:
    return Counter(linear.role for linear in find_linears(graph))


@pytest.mark.parametrize(
    ("model_type", "linear"),
    [
        ("llama", 5),
        ("gemma2", 5),  # norms between projection and residual
        ("granite", 5),  # a factor between them
        ("gpt_neox", 2),  # biases, attention and MLP added to one residual
        ("olmo2", 5),  # a norm after query and key, which feeds no residual
    ],
)
def test_roles(model_type: str, linear: int) -> None:
    model = build_tiny_model(model_type)
    graph = load_graph(shared_trace(model.config, Dtype.FLOAT32))
    graph.bind(StateStore(model), {})
    passes = [p for p in load_target("cpu-int4").passes if not p.name.startswith("pack")]
    run_passes(graph, passes)
    assert _roles(graph) == {
        WeightRole.LINEAR: linear * LAYERS,
        WeightRole.RESIDUAL: 2 * LAYERS,
        WeightRole.LM_HEAD: 1,
    }
