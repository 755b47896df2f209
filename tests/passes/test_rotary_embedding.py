"""Rotary position embeddings as ONNX's own RotaryEmbedding."""

from llmc.graph.match import find_nodes
from tests.passes.harness import (
    LAYERS,
    counts,
    graph_of,
    hold_numbers,
    hold_refusal,
    lowered,
    operators,
    turn_by_the_mask,
)

BEFORE = ("linear", "rms-normalization", "layer-norm")


def test_applies_everywhere_and_keeps_the_numbers() -> None:
    before, after, report = lowered("rotary-embedding", "llama", BEFORE)
    assert counts(report) == ([2] * LAYERS, 0)
    assert operators(before)["Neg"]
    assert not operators(after)["Neg"]
    assert len(find_nodes(after.graph, "RotaryEmbedding")) == 2 * LAYERS
    assert after.graph.opset_imports[""] == 23
    hold_numbers(before, after)


def test_declines_angles_of_something_other_than_positions() -> None:
    graph = graph_of("llama", BEFORE)
    hold_refusal("rotary-embedding", graph, turn_by_the_mask, "rotary-positions", "Neg")
