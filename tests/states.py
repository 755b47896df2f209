"""Tiny models with a state for each kind of layer, and how far a graph of them is from PyTorch."""

from typing import Any

import numpy as np
import torch

from llmc.graph.model import Graph
from tests.state_store import run_steps

LINEAR, FULL, CONV = "linear_attention", "full_attention", "conv"
#: A type for each kind of layer: overrides of its tiny config; convolutions, recurrences and attentions.
TYPES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    # The delta rule with fewer keys than values, and attention.
    "qwen3_next": ({"num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL]}, (2, 2, 2)),
    # Convolutions alone, and attention.
    "lfm2": ({"num_hidden_layers": 4, "layer_types": [CONV, FULL, CONV, FULL]}, (2, 0, 2)),
    # A decay per channel, no attention, and no mask of transformers' own.
    "mamba": ({"state_size": 8, "time_step_rank": 8}, (3, 3, 0)),
    # Two mixers in a layer, and groups of keys.
    "falcon_h1": (
        {
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
        },
        (3, 3, 3),
    ),
    # Layers without a mixer.
    "nemotron_h": (
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "mamba", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
        },
        (2, 2, 1),
    ),
    # A recurrence for each head of a layer, whose states are stored as one, and a mixer with attention.
    "zamba": (
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "n_mamba_heads": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
        },
        (3, 3, 2),
    ),
    # The delta rule with a decay per channel.
    "kimi_linear": ({"num_hidden_layers": 2, "layer_types": [LINEAR, FULL]}, (1, 1, 1)),
}
#: Tokens of the prompt.
REAL = 12


def _expected(model: Any, ids: np.ndarray) -> np.ndarray:
    """One pass of the original over each row alone."""
    with torch.inference_mode():
        return np.concatenate([model(input_ids=torch.from_numpy(row[None])).logits.numpy() for row in ids])


def difference(graph: Graph, model: Any, pad: str) -> float:
    """The largest difference of a prompt and of steps after it, for two rows of which one is padded."""
    ids = np.random.default_rng(0).integers(3, 250, (2, REAL + 4))
    expected = _expected(model, ids)
    given, mask = ids.copy(), np.ones_like(ids)
    real = [slice(0, REAL), slice(0, REAL)]
    short = REAL - 5
    if pad == "left":
        given[1, 5:REAL], mask[1, :5], real[1] = ids[1, :short], 0, slice(5, REAL)
    elif pad == "right":
        given[1, short:REAL], mask[1, short:REAL], real[1] = 0, 0, slice(0, short)
    given[1, REAL:] = ids[1, short : short + 4] if pad else ids[1, REAL:]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    found = run_steps(graph, given, mask, positions, prompt=REAL)
    length = short if pad else REAL
    return max(
        float(np.abs(found[0] - expected[0]).max()),
        float(np.abs(found[1, real[1]] - expected[1, :length]).max()),
        float(np.abs(found[1, REAL:] - expected[1, length : length + 4]).max()),
    )
