"""Attention over a growing cache as GroupQueryAttention."""

import onnx_ir as ir
import pytest

from llmc.graph.match import find_nodes, operand
from llmc.graph.model import CHUNK
from tests.passes.harness import (
    LAYERS,
    chunked_attention,
    counts,
    graph_of,
    hold_numbers,
    hold_ragged_numbers,
    latent_attention,
    lowered,
    operators,
    run_pass,
    shared_cache,
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


def test_layers_that_share_a_cache_read_the_present_of_its_owner() -> None:
    before, after = shared_cache(), shared_cache()
    for name in ("rms-norm", "rotary"):
        run_pass(name, after)
    report = run_pass("group-query-attention", after)
    assert (report.applied, report.refusals) == ((0, 1, 2, 3), ())
    nodes = find_nodes(after.graph, "GroupQueryAttention", "com.microsoft")
    assert [len(n.outputs) for n in nodes] == [3, 3, 1, 1]
    assert [operand(n, 3) for n in nodes[2:]] == [n.outputs[1] for n in nodes[:2]]
    assert {operand(n, 1).name for n in nodes[2:]} == {operand(n, 2).name for n in nodes[2:]}
    assert operators(after)["ConstantOfShape"] == operators(before)["ConstantOfShape"] + 1
    assert after.padding == "right"
    hold_ragged_numbers(before, after)


def test_layers_that_share_a_cache_are_lowered_together_or_not_at_all() -> None:
    graph = shared_cache()
    shared = next(n for n in graph.graph if n.name == "layer.3/attention")
    shared.attributes["chunk"] = ir.AttrInt64("chunk", 4)
    shared.attributes["softcap"] = ir.AttrFloat32("softcap", 5.0)
    report = run_pass("group-query-attention", graph)
    assert report.applied == (0, 2)
    assert {(r.code, r.layer) for r in report.refusals} == {("chunk", 1), ("chunk", 3)}
    unchanged = shared_cache()
    other = next(n for n in unchanged.graph if n.name == "layer.3/attention")
    other.attributes["chunk"] = ir.AttrInt64("chunk", 4)
    other.attributes["softcap"] = ir.AttrFloat32("softcap", 5.0)
    hold_ragged_numbers(unchanged, graph)


def test_chunks_are_a_bias_of_the_rows_own_positions() -> None:
    before, after = chunked_attention(), chunked_attention()
    run_pass("rotary", after)
    report = run_pass("group-query-attention", after)
    assert (report.applied, report.refusals) == ((0, 1, 2), ())
    nodes = find_nodes(after.graph, "GroupQueryAttention", "com.microsoft")
    biases = [n.inputs[10] if len(n.inputs) > 10 else None for n in nodes]
    assert biases[0] is biases[2] is not None
    assert biases[1] is None
    assert [n.metadata_props.get(CHUNK) for n in nodes] == ["4", None, "4"]
    hold_ragged_numbers(before, after)
