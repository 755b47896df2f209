"""A residual sum and its norm as one operator."""

import pytest

from llmc.graph.model import Graph
from tests.passes.harness import (
    LAYERS,
    graph_before,
    hold_numbers,
    hold_refusal,
    in_layer,
    lowered,
    operators,
)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_declines_nowhere_and_keeps_the_numbers(model_type: str) -> None:
    before, after, report = lowered("skip-norm", model_type)
    assert report.refusals == ()
    assert len(report.applied) == 2 * LAYERS + (model_type == "gpt2")
    hold_numbers(before, after)


def test_residual_sums_and_norms_are_one_operator() -> None:
    _, after, _ = lowered("skip-norm", "llama")
    found = operators(after)
    assert found["SkipSimplifiedLayerNormalization"] == 2 * LAYERS
    assert found["SimplifiedLayerNormalization"] == 1
    assert not found["Add"]


def _add_a_vector(graph: Graph) -> None:
    norm = in_layer(graph, "SimplifiedLayerNormalization")
    total = norm.inputs[0].producer()  # type: ignore[union-attr]
    assert total is not None
    assert total.op_type == "Add"
    total.replace_input_with(1, norm.inputs[1])


def test_declines_a_sum_with_a_vector() -> None:
    graph = graph_before("skip-norm", "llama")
    hold_refusal("skip-norm", graph, _add_a_vector, "broadcast", "SimplifiedLayerNormalization")
