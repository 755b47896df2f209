"""Decoder layers that text alone does not run."""

import pytest

from llmc.config import Dtype
from llmc.errors import UnsupportedError
from llmc.trace.tracer import trace_model
from tests.models import tiny_config


def test_layers_that_attend_to_an_image_are_left_out() -> None:
    config = tiny_config("mllama", text_config={"num_hidden_layers": 6, "cross_attention_layers": [1, 4]})
    graph = trace_model(config, Dtype.FLOAT32)
    assert (graph.layers, [slot.layer for slot in graph.cache]) == (4, [0, 1, 2, 3])
    names = [name for name in graph.graph.initializers if ".layers." in name]
    assert {name.split(".layers.")[1].split(".")[0] for name in names} == {"0", "2", "3", "5"}
    (note,) = [note for note in graph.notes if note.startswith("text only")]
    assert note == (
        "text only: the model skips layers 1, 4, which would attend to an image, and so does the artifact"
    )


def test_layers_that_run_without_an_image_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mllama import modeling_mllama

    monkeypatch.setattr(modeling_mllama, "_has_cached_cross_attention_states", lambda *_: True)
    config = tiny_config("mllama", text_config={"num_hidden_layers": 6, "cross_attention_layers": [1, 4]})
    with pytest.raises(UnsupportedError, match="has cross-attention in layers 1, 4: besides the text"):
        trace_model(config, Dtype.FLOAT32)
