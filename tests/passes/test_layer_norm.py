"""A layer norm spelled out as one LayerNormalization."""

from tests.passes.harness import (
    LAYERS,
    counts,
    graph_before,
    hold_numbers,
    hold_refusal,
    lowered,
    operators,
    scale_another_tensor,
)


def test_applies_everywhere_and_keeps_the_numbers() -> None:
    before, after, report = lowered("layer-norm", "cohere")
    assert counts(report) == ([1] * LAYERS, 1)
    assert operators(before)["ReduceMean"]
    assert not operators(after)["ReduceMean"]
    assert operators(after)["LayerNormalization"] == LAYERS + 1
    hold_numbers(before, after)


def test_declines_a_norm_of_another_tensor() -> None:
    graph = graph_before("layer-norm", "cohere")
    hold_refusal("layer-norm", graph, scale_another_tensor, "norm-form", "ReduceMean")
