"""What a gate computes, read off by calling it; and layers of experts whose gate is none that we know."""

from collections.abc import Callable

import pytest
import torch

from llmc.config import Dtype
from llmc.trace import trace_model
from llmc.trace.experts import SwiGlu, is_squared_relu, read_gate
from tests.models import tiny_config

Gate = Callable[[torch.Tensor], torch.Tensor]


def _halves(activation: Gate) -> Gate:
    def gate(both: torch.Tensor) -> torch.Tensor:
        first, second = both.chunk(2, dim=-1)
        return activation(first) * second

    return gate


@pytest.mark.parametrize(
    "gate",
    [
        SwiGlu(1.0, 0.0, 0.0, interleaved=False),
        SwiGlu(1.0, 0.0, 0.0, interleaved=True),
        SwiGlu(1.702, 1.0, 7.0, interleaved=True),
        SwiGlu(1.25, 0.5, 10.0, interleaved=False),
    ],
)
def test_a_swiglu_is_read_off(gate: SwiGlu) -> None:
    assert read_gate(gate, 12) == gate


@pytest.mark.parametrize(
    "gate",
    [
        _halves(torch.nn.functional.gelu),
        _halves(torch.relu),
        _halves(torch.tanh),
        lambda both: _halves(torch.nn.functional.silu)(both.flip(-1)),
    ],
    ids=["gelu", "relu", "tanh", "halves swapped"],
)
def test_another_gate_is_not(gate: Gate) -> None:
    assert read_gate(gate, 12) is None


def test_experts_with_another_gate_are_dense_and_said_to_be() -> None:
    graph = trace_model(tiny_config("mixtral", hidden_act="gelu"), Dtype.FLOAT32)
    assert not [n for n in graph.graph if n.op_type == "Experts"]
    assert graph.notes == [
        "experts traced as dense products in layers 0-2, kept in float: their gate is not a SwiGLU"
    ]


def test_a_squared_relu_is_told_from_other_activations() -> None:
    assert is_squared_relu(lambda x: torch.relu(x) ** 2)
    assert not is_squared_relu(torch.relu)
    assert not is_squared_relu(torch.square)
    assert not is_squared_relu(lambda x: torch.nn.functional.silu(x) * x)


def test_experts_without_a_gate_have_a_squared_relu_or_are_dense() -> None:
    squared = trace_model(tiny_config("nemotron_h"), Dtype.FLOAT32)
    assert [n.op_type for n in squared.graph].count("Experts") == 1
    assert not [note for note in squared.notes if "experts" in note]
    plain = trace_model(tiny_config("nemotron_h", mlp_hidden_act="silu"), Dtype.FLOAT32)
    assert not [n for n in plain.graph if n.op_type == "Experts"]
    (note,) = (note for note in plain.notes if "experts" in note)
    layer = tiny_config("nemotron_h").layers_block_type.index("moe")
    assert note == (
        f"experts traced as dense products in layers {layer}, kept in float: their activation is not a "
        "squared ReLU"
    )
