"""Gate and up projections as one product and a split."""

import pytest

from llmc.graph.model import Graph
from tests.passes.harness import (
    LAYERS,
    copy_of,
    counts,
    graph_before,
    hold_numbers,
    hold_refusal,
    in_layer,
    lowered,
    operators,
)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_applies_everywhere_and_keeps_the_numbers(model_type: str) -> None:
    before, after, report = lowered("pack-gate-up", model_type)
    assert counts(report) == ([1] * LAYERS, 0)
    hold_numbers(before, after)


def test_packing_joins_products() -> None:
    before, after, _ = lowered("pack-gate-up", "llama")
    assert operators(before)["MatMul"] == 5 * LAYERS + 1
    assert operators(after)["MatMul"] == 4 * LAYERS + 1
    names = set(after.graph.initializers)
    assert "model.layers.0.mlp.gate_up_proj.weight" in names
    assert "model.layers.0.mlp.gate_proj.weight" not in names


def _feed_up_with_a_copy(graph: Graph) -> None:
    gate = in_layer(graph, "Sigmoid").inputs[0]
    activation = gate.producer().inputs[0]  # type: ignore[union-attr]
    up = next(n for n, _ in activation.uses() if n.op_type == "MatMul" and n is not gate.producer())  # type: ignore[union-attr]
    up.replace_input_with(0, copy_of(graph, activation, up))  # type: ignore[arg-type]


def test_declines_products_of_different_activations() -> None:
    graph = graph_before("pack-gate-up", "llama")
    hold_refusal("pack-gate-up", graph, _feed_up_with_a_copy, "activation", "Sigmoid")
