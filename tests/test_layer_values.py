"""Fields of a config whose values differ by layer."""

import numpy as np

from llmc.architecture import values_by_layer
from llmc.validate.reference import TorchModel, sliding_window
from tests.models import build_tiny_model, tiny_config


def test_a_field_has_the_values_of_all_layers() -> None:
    config = tiny_config("dots3_note_text")
    assert config.is_heterogeneous
    assert values_by_layer(config, "num_attention_heads") == (4, 2)
    assert values_by_layer(config, "hidden_size") == (64,)
    assert values_by_layer(tiny_config("llama"), "num_attention_heads") == (4,)
    assert values_by_layer(tiny_config("llama"), "unknown") == (None,)
    assert sliding_window(config) == 8


def test_the_original_of_such_a_config_is_asked() -> None:
    model = TorchModel(build_tiny_model("dots3_note_text"))
    assert model.logits(np.arange(3, 30), keep=2).shape == (2, 256)
