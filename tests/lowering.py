"""Tiny models lowered to a KV cache of fixed length, as files and as what runs them."""

from functools import cache
from pathlib import Path

from transformers import PreTrainedModel

from llmc.backends.model_file import write_model
from llmc.config import Dtype, EngineRule
from llmc.graph.interface import Interface
from llmc.graph.model import Graph
from llmc.graph.report import PassReport
from llmc.graph.serial import load_graph
from llmc.graph.verify import verify_graph
from llmc.passes import registered_passes
from llmc.quantize.engine import quantize_for_engine
from tests.caches import shared_trace
from tests.models import build_tiny_model
from tests.state_store import StateStore

CAPACITY = 128
PASSES = (
    "linear",
    "rms-normalization",
    "layer-norm",
    "rotary-embedding",
    "static-cache",
    "pack-shared",
    "last-token-logits",
)


@cache
def tiny(model_type: str) -> PreTrainedModel:
    """The model, made once."""
    return build_tiny_model(model_type)


@cache
def traced(model_type: str, dtype: Dtype) -> bytes:
    return shared_trace(tiny(model_type).config, dtype)


def lower(
    model_type: str, dtype: Dtype, last: str = "static-cache", capacity: int | None = CAPACITY
) -> tuple[Graph, dict[str, PassReport]]:
    """The graph after the pass `last`, and the report of each pass."""
    graph = load_graph(traced(model_type, dtype))
    graph.bind(StateStore(tiny(model_type)), {})
    graph.max_length = capacity
    reports = {}
    for name in PASSES[: PASSES.index(last) + 1]:
        reports[name] = registered_passes()[name].run(graph)
        verify_graph(graph)
    return graph, reports


def write_lowered(
    folder: Path, model_type: str, dtype: Dtype, rules: tuple[EngineRule, ...] = (), last: str = "pack-shared"
) -> Interface:
    """Write model.onnx of the lowered, quantized graph; its interface."""
    graph, _ = lower(model_type, dtype, last)
    quantize_for_engine(graph, rules, None)
    verify_graph(graph)
    write_model(graph.model, folder)
    return graph.interface()
