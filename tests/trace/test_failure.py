"""Why a model's own code cannot be traced."""

import re
from typing import Any

import pytest
import torch

from llmc.config import Dtype
from llmc.trace.failure import explain_failure, watch_states
from llmc.trace.tracer import trace_model
from tests.models import tiny_config


class _Recurrent(torch.nn.Module):
    """Keeps the sum of all tokens in an attribute."""

    table: torch.Tensor
    state: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(1)
        self.state = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.state = self.table * tokens.sum()
        raise ValueError("what follows from it")


def test_a_state_in_a_module_is_the_reason() -> None:
    model: Any = torch.nn.Sequential(_Recurrent())
    kept = watch_states(model)
    with pytest.raises(ValueError, match="what follows") as caught:
        model(torch.ones(2))
    error = explain_failure(model, caught.value, kept)
    assert error.fact == "Sequential keeps a state in 0.state (_Recurrent), outside of the cache"


def test_the_module_and_the_line_are_named() -> None:
    said = " ".join(trace_model(tiny_config("bloom"), Dtype.FLOAT32).notes)
    place = r"fails in transformer.h.0.self_attention \(BloomAttention\) at modeling_bloom.py:\d+ \("
    assert re.search(place, said), said
    assert "Error" not in said
