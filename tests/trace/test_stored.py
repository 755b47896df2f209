"""What layers with attention in plain operators store: keys and values of two widths, and an index's keys."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from llmc.config import Dtype
from llmc.errors import UnsupportedError
from llmc.graph.match import find_nodes
from llmc.graph.model import Graph
from llmc.trace import trace_model
from llmc.trace.cache import tracing_cache_class
from llmc.trace.capture import Capture
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


def _hold_steps(model: Any, graph: Graph, prompt: int) -> None:
    """Hold a prompt and five steps of two rows to one pass of the model."""
    ids = np.random.default_rng(0).integers(3, 250, (2, prompt + 5))
    positions = np.tile(np.arange(prompt + 5), (2, 1))
    found = run_steps(graph, ids, np.ones_like(ids), positions, prompt=prompt)
    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("prompt", [3, TOP, 15])
def test_an_index_chooses_the_tokens_that_the_original_chooses(prompt: int) -> None:
    model, graph = _sparse()
    _hold_steps(model, graph, prompt)


def test_a_model_may_read_how_much_a_layer_stores() -> None:
    """Pools of tokens are chosen by an index, from as many keys as the layer has; none has a rotated part."""
    model = build_tiny_model(
        "glm5_next",
        num_hidden_layers=1,
        layer_types=["indexed_attention"],
        indexer_types=["full"],
        mlp_layer_types=["dense"],
        index_kpool=4,
        index_topk=8,
    )
    graph = trace_model(model.config, Dtype.FLOAT32)
    graph.bind(StateStore(model), {})
    for prompt in (2, 15):
        _hold_steps(model, graph, prompt)


def test_a_layer_has_its_length_and_nothing_that_it_did_not_store() -> None:
    capture = Capture()
    past = tracing_cache_class()(capture, 8, 3, 2, whole=True)
    layer = past.layers[1]
    assert (len(past.layers), layer.get_seq_length(), layer.get_mask_sizes(3)) == (2, 5, (8, 0))
    for read in ("keys", "values"):
        assert getattr(layer, read).numel() > 0  # those of earlier tokens
        for use in (lambda tensor: tensor.shape, lambda tensor: torch.cat([tensor, torch.zeros(1)])):
            with pytest.raises(
                UnsupportedError, match="reads keys and values of layer 1 of its cache itself"
            ):
                use(getattr(layer, read))
    with pytest.raises(UnsupportedError, match="reads cumulative_length of layer 1 of its cache itself"):
        _ = layer.cumulative_length
    keys, values = past.update(torch.zeros(2, 4, 3, 6), torch.zeros(2, 4, 3, 5), 1)
    assert layer.keys is keys
    assert layer.values is values
    assert keys.shape[2] == layer.get_seq_length() == past.get_seq_length(1) == 8
    assert past.get_seq_length(0) == 5
