"""RMSNorm as ONNX Runtime's SimplifiedLayerNormalization."""

import pytest

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


@pytest.mark.parametrize(("model_type", "per_layer"), [("llama", 2), ("gemma2", 4)])
def test_applies_everywhere_and_keeps_the_numbers(model_type: str, per_layer: int) -> None:
    before, after, report = lowered("rms-norm", model_type)
    assert counts(report) == ([per_layer] * LAYERS, 1)
    assert operators(before)["ReduceMean"]
    assert not operators(after)["ReduceMean"]
    assert operators(after)["SimplifiedLayerNormalization"] == per_layer * LAYERS + 1
    hold_numbers(before, after)


def test_declines_a_norm_of_another_tensor() -> None:
    graph = graph_before("rms-norm", "llama")
    hold_refusal("rms-norm", graph, scale_another_tensor, "norm-form", "ReduceMean")
