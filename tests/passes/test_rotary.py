"""Rotary position embeddings as com.microsoft RotaryEmbedding."""

from llmc.graph.domains import MICROSOFT
from llmc.graph.match import find_nodes
from tests.passes.harness import (
    LAYERS,
    chunked_attention,
    counts,
    graph_before,
    hold_numbers,
    hold_refusal,
    lowered,
    operators,
    run_pass,
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


def test_products_of_complex_numbers_are_rotations_of_neighbours() -> None:
    before, after = chunked_attention(), chunked_attention()
    report = run_pass("rotary", after)
    assert (report.applied, report.refusals) == ((0, 0, 2, 2), ())
    rotations = find_nodes(after.graph, "RotaryEmbedding", MICROSOFT)
    assert {n.attributes["interleaved"].as_int() for n in rotations} == {1}
    assert not operators(after)["Cos"]
    hold_numbers(before, after)
