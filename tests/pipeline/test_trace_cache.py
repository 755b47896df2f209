"""A graph is the same whether it was traced now or comes from the cache."""

from pathlib import Path

import onnx_ir as ir
import pytest

from llmc.checkpoint import open_checkpoint
from llmc.config import Dtype
from llmc.graph.model import Graph
from llmc.pipeline.steps.compile import trace, trace_key
from llmc.progress import SilentProgress
from tests.models import save_tiny_model, tiny_config


def _floats(graph: Graph) -> list[float]:
    attributes = (a for node in graph.graph for a in node.attributes.values())
    return [a.as_float() for a in attributes if a.type is ir.AttributeType.FLOAT]


def test_floats_are_those_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    save_tiny_model("opt", tmp_path / "model", tokenizer=True)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    traced, cached = (_floats(trace(checkpoint, Dtype.FLOAT32, SilentProgress())) for _ in range(2))
    assert 0 < traced[0] < 1e-4  # an epsilon that is not exact in float32
    assert traced == cached


def test_a_trace_does_not_depend_on_how_weights_are_stored() -> None:
    config = tiny_config("llama")
    key = trace_key(config, Dtype.FLOAT32)
    config.dtype, config.architectures = "float16", ["LlamaForCausalLM"]
    assert trace_key(config, Dtype.FLOAT32) == key
    assert trace_key(config, Dtype.FLOAT16) != key


def test_a_trace_depends_on_the_class_that_is_built() -> None:
    keys = set()
    for architecture in ("Emu3ForCausalLM", "Emu3ForConditionalGeneration"):
        config = tiny_config("emu3")
        config.architectures = [architecture]
        keys.add(trace_key(config, Dtype.FLOAT32))
    assert len(keys) == 2
