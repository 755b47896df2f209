"""Values as wide as keys, so that one cache holds both."""

import numpy as np

from llmc.graph import dialect
from llmc.graph.domains import DIALECT
from llmc.graph.match import find_nodes, operand
from tests.passes.harness import LAYERS, latent_attention, logits_of, operators, run_pass


def test_values_are_as_wide_as_keys_and_the_numbers_stay() -> None:
    graph = latent_attention(v_head_dim=8)
    expected = logits_of(graph, 9, prompt=5)
    assert {(s.key_width, s.value_width) for s in graph.cache} == {(32, 8)}
    report = run_pass("equal-widths", graph)
    assert report.applied == (0, 1, 2)
    assert report.refusals == ()
    assert {(s.key_width, s.value_width) for s in graph.cache} == {(32, 32)}
    np.testing.assert_allclose(logits_of(graph, 9, prompt=5), expected, atol=1e-5)
    report = run_pass("group-query-attention", graph)
    assert report.applied == (0, 1, 2)
    assert not operators(graph)["CachedAttention"]
    np.testing.assert_allclose(logits_of(graph, 9, prompt=5), expected, atol=1e-5)


def test_layers_that_share_a_cache_are_padded_once() -> None:
    graph = latent_attention(v_head_dim=8)
    first, second = find_nodes(graph.graph, dialect.CACHED_ATTENTION, DIALECT)[:2]
    for index in range(1, 5):  # the second layer reads the cache of the first
        if operand(second, index).is_graph_input():
            graph.graph.inputs.remove(operand(second, index))
        second.replace_input_with(index, operand(first, index))
    for value in second.outputs[1:]:
        graph.graph.outputs.remove(value)
    graph.cache = tuple(slot for slot in graph.cache if slot.layer != 1)
    expected = logits_of(graph, 9, prompt=5)
    report = run_pass("equal-widths", graph)
    assert (report.applied, report.refusals) == ((0, 1, 2), ())
    assert operators(graph)["Pad"] == 2
    np.testing.assert_allclose(logits_of(graph, 9, prompt=5), expected, atol=1e-5)


def test_keys_narrower_than_values_are_declined() -> None:
    graph = latent_attention(v_head_dim=40)
    report = run_pass("equal-widths", graph)
    assert report.applied == ()
    assert {(r.code, r.layer) for r in report.refusals} == {("narrow-keys", n) for n in range(LAYERS)}
    assert {s.value_width for s in graph.cache} == {40}
