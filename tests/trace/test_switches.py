"""Rotary embeddings whose frequencies depend on how long a step is."""

from typing import Any

import pytest

from llmc.config import Dtype
from llmc.errors import UnsupportedError
from llmc.trace import trace_model
from tests.models import longrope, tiny_config


@pytest.mark.parametrize(
    ("model_type", "fields", "restart"),
    [
        ("llama", {"rope_parameters": longrope(64)}, None),
        ("phi3", {"rope_parameters": longrope(64), "original_max_position_embeddings": 64}, 64),
    ],
)
def test_whether_generate_drops_the_cache_at_the_switch(
    model_type: str, fields: dict[str, Any], restart: int | None
) -> None:
    graph = trace_model(tiny_config(model_type, **fields), Dtype.FLOAT32)
    assert graph.restart == restart
    assert graph.max_length == 256


def test_code_that_branches_on_the_length_is_named() -> None:
    rope = longrope(64) | {"short_mscale": 1.1, "long_mscale": 1.3}
    with pytest.raises(
        UnsupportedError, match=r"depends on the values of a step in .* at modeling_phimoe\.py:"
    ):
        trace_model(tiny_config("phimoe", rope_parameters=rope), Dtype.FLOAT32)


def test_dynamic_scaling_is_held_up_to_the_length_where_it_begins() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    graph = trace_model(tiny_config("llama", rope_parameters=rope), Dtype.FLOAT32)
    assert graph.max_length == 256
    assert "beyond 256 tokens (dynamic NTK); the context ends there" in graph.notes[0]
