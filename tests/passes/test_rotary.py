"""Rotary position embeddings as com.microsoft RotaryEmbedding."""

from llmc.graph.domains import MICROSOFT
from llmc.graph.match import find_nodes
from tests.passes.harness import (
    LAYERS,
    counts,
    graph_before,
    hold_numbers,
    hold_refusal,
    lowered,
    operators,
    turn_by_the_mask,
)


def test_applies_everywhere_and_keeps_the_numbers() -> None:
    before, after, report = lowered("rotary", "llama")
    assert counts(report) == ([2] * LAYERS, 0)
    assert operators(before)["Neg"]
    assert not operators(after)["Neg"]
    assert len(find_nodes(after.graph, "RotaryEmbedding", MICROSOFT)) == 2 * LAYERS
    hold_numbers(before, after)


def test_declines_angles_of_something_other_than_positions() -> None:
    hold_refusal("rotary", graph_before("rotary", "llama"), turn_by_the_mask, "rotary-positions", "Neg")
