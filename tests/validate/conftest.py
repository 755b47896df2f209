"""Tiny models that stand for the original."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

VOCABULARY = 256

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}


@pytest.fixture(scope="package", autouse=True)
def _one_thread(pytestconfig: pytest.Config) -> Iterator[None]:
    """Models this small are slower on several threads."""
    if pytestconfig.getoption("--without-torch"):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(config_class: str, **overrides: Any) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**SIZES, **overrides})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def llama() -> Any:
    return build("LlamaConfig")


@pytest.fixture(scope="session")
def mistral() -> Any:
    """A model whose every layer has a sliding window of 8."""
    return build("MistralConfig", sliding_window=8)


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY - 8, 700)
