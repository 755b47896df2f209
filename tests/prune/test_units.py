"""Neurons and groups of heads, found in traced graphs."""

import numpy as np
import pytest

from llmc.config import Dtype
from llmc.errors import UnsupportedError
from llmc.graph.serial import load_graph
from llmc.prune.units import Structure, UnitSlice, find_matrices, find_units, require_units
from tests.caches import shared_trace
from tests.models import tiny_config

LAYERS = 3


def _structure(model_type: str) -> Structure:
    return find_units(load_graph(shared_trace(tiny_config(model_type), Dtype.FLOAT32)))


def test_matrices_that_each_make_one_thing() -> None:
    found = _structure("llama")
    assert [(u.layer, u.count, u.heads) for u in found.neurons] == [(i, 96, 0) for i in range(LAYERS)]
    assert [(u.layer, u.count, u.heads) for u in found.groups] == [(i, 2, 2) for i in range(LAYERS)]
    mlp, attention = "model.layers.1.mlp", "model.layers.1.self_attn"
    assert found.neurons[1].reader == UnitSlice(f"{mlp}.down_proj.weight", 1, 0, 1, 1)
    assert {p.parameter for p in found.neurons[1].makers} == {
        f"{mlp}.gate_proj.weight",
        f"{mlp}.up_proj.weight",
    }
    assert set(found.groups[1].makers) == {
        UnitSlice(f"{attention}.q_proj.weight", 0, 0, 1, 32),
        UnitSlice(f"{attention}.k_proj.weight", 0, 0, 1, 16),
        UnitSlice(f"{attention}.v_proj.weight", 0, 0, 1, 16),
    }
    assert found.groups[1].reader == UnitSlice(f"{attention}.o_proj.weight", 1, 0, 1, 32)


def test_matrices_that_are_joined() -> None:
    found = _structure("phi3")
    joined = "model.layers.0.self_attn.qkv_proj.weight"
    assert {(p.parameter, p.start, p.width) for p in found.groups[0].makers} == {
        (joined, 0, 32),
        (joined, 64, 16),
        (joined, 96, 16),
    }
    assert {p.start for p in found.neurons[0].makers} == {0, 96}


def test_heads_one_after_the_other_with_their_biases() -> None:
    found = _structure("gpt_neox")
    joined = "gpt_neox.layers.0.attention.query_key_value"
    assert set(found.groups[0].makers) == {
        UnitSlice(f"{joined}.weight", 0, 0, 1, 48),
        UnitSlice(f"{joined}.bias", 0, 0, 1, 48),
    }
    assert found.groups[0].reader.indices(np.array([1, 3])).tolist() == [*range(16, 32), *range(48, 64)]


def test_norms_over_all_heads_tie_them_together() -> None:
    found = _structure("olmo2")
    assert len(found.neurons) == LAYERS
    with pytest.raises(
        UnsupportedError, match=r"layer 0 has 0 projections whose groups can be separated.*o_proj"
    ) as caught:
        require_units(found.groups, LAYERS, found, "groups")
    assert caught.value.hint is not None


def test_experts_are_no_neurons() -> None:
    graph = load_graph(shared_trace(tiny_config("mixtral"), Dtype.FLOAT32))
    assert find_units(graph).neurons == ()
    assert not any("experts" in name or "gate" in name for name in find_matrices(graph))
    assert len(find_matrices(graph)) == 4 * LAYERS
