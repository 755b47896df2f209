"""The latent of multi-head latent attention in the cache."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.graph import dialect
from llmc.graph.domains import DIALECT
from llmc.graph.latent import LATENT_ATTENTION
from llmc.graph.match import find_nodes, operand
from llmc.graph.model import Graph
from tests.passes.harness import (
    LAYERS,
    graph_of,
    hold_ragged_numbers,
    latent_attention,
    logits_of,
    operators,
    run_pass,
    with_fields,
)

#: Sizes of the tiny model's rows and heads.
RANK, SHARED = 16, 16


def _expanded_from(graph: Graph, tokens: int) -> None:
    for node in find_nodes(graph.graph, LATENT_ATTENTION, DIALECT):
        node.attributes["expanded_from"] = ir.AttrInt64("expanded_from", tokens)


@pytest.mark.parametrize(("model_type", "fields"), [("deepseek_v3", {"v_head_dim": 8}), ("minicpm3", {})])
def test_the_latent_is_cached_and_the_numbers_stay(model_type: str, fields: dict[str, int]) -> None:
    graph = with_fields(model_type, **fields)
    expected = logits_of(graph, 9, prompt=5)
    report = run_pass("latent-attention", graph)
    assert (set(report.applied), report.refusals) == (set(range(graph.layers)), ())
    assert {(s.kv_heads, s.key_width + s.value_width) for s in graph.cache} == {(1, RANK + SHARED)}
    assert {s.key_width for s in graph.cache} == {s.value_width for s in graph.cache}  # as runtimes allocate
    assert not operators(graph)["CachedAttention"]
    for tokens in (1, 4, 100):  # keys and values of all steps, of the prompt, of none
        _expanded_from(graph, tokens)
        np.testing.assert_allclose(logits_of(graph, 9, prompt=5), expected, atol=1e-4)


def test_a_prompt_expands_latents_where_that_takes_less_arithmetic() -> None:
    graph = latent_attention(v_head_dim=8)
    run_pass("latent-attention", graph)
    nodes = find_nodes(graph.graph, LATENT_ATTENTION, DIALECT)
    # rank (own + value) = 16 x 24 products once, against 2 x 16 - 24 for each token
    assert {n.attributes["expanded_from"].as_int() for n in nodes} == {48}


def test_rows_of_unequal_length_have_the_same_numbers() -> None:
    graph = latent_attention()
    run_pass("latent-attention", graph)
    hold_ragged_numbers(latent_attention(), graph)
    _expanded_from(graph, 1)
    hold_ragged_numbers(latent_attention(), graph)


def _attention(graph: Graph, layer: int = 1) -> ir.Node:
    return find_nodes(graph.graph, dialect.CACHED_ATTENTION, DIALECT)[layer]


def _limit(graph: Graph) -> None:
    """Let attention have a softcap, a window and sinks."""
    for node in find_nodes(graph.graph, dialect.CACHED_ATTENTION, DIALECT):
        node.attributes["softcap"] = ir.AttrFloat32("softcap", 0.5)
        node.attributes["window"] = ir.AttrInt64("window", 3)
        sinks = ir.val("sinks", const_value=ir.tensor(np.linspace(-1, 1, 4, dtype=np.float32), name="sinks"))
        graph.graph.initializers.setdefault("sinks", sinks)
        node.resize_inputs(7)
        node.replace_input_with(6, graph.graph.initializers["sinks"])
    function = dialect.cached_attention(sinks=True)
    graph.model.functions[function.identifier()] = function


def test_windows_softcaps_and_sinks_are_kept() -> None:
    graph = latent_attention()
    plain = logits_of(graph, 9, prompt=5)
    _limit(graph)
    expected = logits_of(graph, 9, prompt=5)
    assert np.abs(expected - plain).max() > 1e-3
    run_pass("latent-attention", graph)
    for tokens in (1, 100):
        _expanded_from(graph, tokens)
        np.testing.assert_allclose(logits_of(graph, 9, prompt=5), expected, atol=1e-4)


def test_other_attention_stays() -> None:
    graph = graph_of("llama")
    report = run_pass("latent-attention", graph)
    assert (report.applied, report.refusals) == ((), ())
    assert operators(graph)["CachedAttention"] == LAYERS


def _scale_values(graph: Graph) -> None:
    node = _attention(graph)
    value = operand(node, 2)
    double = ir.Node("", "Add", [value, value], num_outputs=1, name="double")
    double.outputs[0].shape, double.outputs[0].type = value.shape, value.type
    double.outputs[0].name = "double"
    graph.graph.insert_before(node, double)
    node.replace_input_with(2, double.outputs[0])


def _share_the_cache(graph: Graph) -> None:
    first, second = _attention(graph, 0), _attention(graph)
    for index in range(1, 5):
        if operand(second, index).is_graph_input():
            graph.graph.inputs.remove(operand(second, index))
        second.replace_input_with(index, operand(first, index))
    for value in second.outputs[1:]:
        graph.graph.outputs.remove(value)
    graph.cache = tuple(slot for slot in graph.cache if slot.layer != 1)


@pytest.mark.parametrize(
    ("fields", "spoil", "code"),
    [
        ({}, _scale_values, "projection"),
        ({}, _share_the_cache, "shared"),
        ({"kv_lora_rank": 256}, lambda _: None, "width"),
    ],
)
def test_layers_that_cannot_cache_it_keep_keys_and_values(
    fields: dict[str, int], spoil: Any, code: str
) -> None:
    graph = latent_attention(**fields)
    spoil(graph)
    expected = logits_of(graph, 9, prompt=5)
    report = run_pass("latent-attention", graph)
    assert (code, 1) in {(r.code, r.layer) for r in report.refusals}
    assert all(r.reason and r.node for r in report.refusals)
    assert operators(graph)["CachedAttention"] >= 1
    np.testing.assert_allclose(logits_of(graph, 9, prompt=5), expected, atol=1e-4)
