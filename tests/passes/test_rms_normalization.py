"""RMSNorm as ONNX's own RMSNormalization."""

from tests.passes.harness import (
    LAYERS,
    counts,
    graph_of,
    hold_numbers,
    hold_refusal,
    lowered,
    operators,
    scale_another_tensor,
)

BEFORE = ("linear",)


def test_applies_everywhere_and_keeps_the_numbers() -> None:
    before, after, report = lowered("rms-normalization", "llama", BEFORE)
    assert counts(report) == ([2] * LAYERS, 1)
    assert operators(after)["RMSNormalization"] == 2 * LAYERS + 1
    assert not operators(after)["ReduceMean"]
    assert after.graph.opset_imports[""] == 23
    hold_numbers(before, after)


def test_declines_a_norm_of_another_tensor() -> None:
    graph = graph_of("llama", BEFORE)
    hold_refusal("rms-normalization", graph, scale_another_tensor, "norm-form", "ReduceMean")
