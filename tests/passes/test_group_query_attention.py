"""Attention over a growing cache as GroupQueryAttention."""

import pytest

from tests.passes.harness import (
    LAYERS,
    counts,
    graph_of,
    hold_numbers,
    latent_attention,
    lowered,
    operators,
    run_pass,
)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_applies_everywhere_and_keeps_the_numbers(model_type: str) -> None:
    before, after, report = lowered("group-query-attention", model_type)
    assert counts(report) == ([1] * LAYERS, 0)
    assert operators(before)["CachedAttention"]
    assert not operators(after)["CachedAttention"]
    hold_numbers(before, after)


def test_keys_wider_than_values_stay_with_the_dialect() -> None:
    report = run_pass("group-query-attention", latent_attention(v_head_dim=8))
    assert report.applied == ()
    assert {r.code for r in report.refusals} == {"value-width"}


def test_attention_in_plain_operators_is_declined_layer_by_layer() -> None:
    graph = graph_of("bloom")
    report = run_pass("group-query-attention", graph)
    assert report.applied == ()
    assert {(r.code, r.layer) for r in report.refusals} == {("plain-attention", n) for n in range(LAYERS)}
    assert graph.padding == "any"
