"""What layers with attention in plain operators store: keys and values of two widths, and an index's keys."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from llmc.config import Dtype
from llmc.graph.match import find_nodes
from llmc.graph.model import Graph
from llmc.trace import trace_model
from tests.models import build_tiny_model
from tests.state_store import StateStore, run_steps

LAYERS, TOP = 2, 6


@cache
def _sparse() -> tuple[Any, Graph]:
    """A model that attends to the best `TOP` tokens by an index; it stores a latent and a rotated key."""
    sizes = {"num_hidden_layers": LAYERS, "first_k_dense_replace": LAYERS, "kv_lora_rank": 19}
    model = build_tiny_model("deepseek_v32", index_topk=TOP, index_head_dim=33, **sizes)
    graph = trace_model(model.config, Dtype.FLOAT32)
    graph.bind(StateStore(model), {})
    return model, graph


def test_slots_are_halves_of_one_tensor() -> None:
    _, graph = _sparse()
    latent, rotated, index = 19, 16, 33
    widths = {s.layer: (s.kv_heads, s.key_width, s.value_width) for s in graph.cache}
    layer, top = (latent + rotated + 1) // 2, (index + 1) // 2
    assert widths == {0: (1, layer, layer), 1: (1, layer, layer), 2: (1, top, top), 3: (1, top, top)}
    assert graph.layers == LAYERS
    assert [node.inputs[1] is not None for node in find_nodes(graph.graph, "TopK")] == [True] * LAYERS


@pytest.mark.parametrize("prompt", [3, TOP, 15])
def test_an_index_chooses_the_tokens_that_the_original_chooses(prompt: int) -> None:
    model, graph = _sparse()
    ids = np.random.default_rng(0).integers(3, 250, (2, prompt + 5))
    positions = np.tile(np.arange(prompt + 5), (2, 1))
    found = run_steps(graph, ids, np.ones_like(ids), positions, prompt=prompt)
    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
