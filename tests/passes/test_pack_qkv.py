"""Query, key and value projections as one product."""

import numpy as np
import pytest

from tests.lowering import tiny
from tests.passes.harness import LAYERS, counts, hold_numbers, lowered, operators
from tests.state_store import StateStore


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_applies_everywhere_and_keeps_the_numbers(model_type: str) -> None:
    before, after, report = lowered("pack-qkv", model_type)
    assert counts(report) == ([1] * LAYERS, 0)
    hold_numbers(before, after)


def test_packing_joins_products() -> None:
    before, after, _ = lowered("pack-qkv", "llama")
    assert operators(before)["MatMul"] == 7 * LAYERS + 1
    assert operators(after)["MatMul"] == 5 * LAYERS + 1
    names = set(after.graph.initializers)
    assert "model.layers.0.self_attn.qkv_proj.weight" in names
    assert "model.layers.0.self_attn.q_proj.weight" not in names


def test_biases_are_joined_with_the_weights() -> None:
    _, after, _ = lowered("pack-qkv", "qwen2")
    bias = after.graph.initializers["model.layers.1.self_attn.qkv_proj.bias"].const_value
    assert bias is not None
    state = StateStore(tiny("qwen2")).arrays
    parts = [state[f"model.layers.1.self_attn.{p}_proj.bias"] for p in "qkv"]
    np.testing.assert_array_equal(bias.numpy(), np.concatenate(parts))


def test_declines_normalised_queries() -> None:
    _, _, report = lowered("pack-qkv", "qwen3")
    assert report.applied == ()
    assert {r.code for r in report.refusals} == {"not-a-projection"}
    assert [r.layer for r in report.refusals] == [0, 1, 2]
