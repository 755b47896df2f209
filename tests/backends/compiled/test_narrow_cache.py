"""The type of a KV cache that kernels do not read."""

from llmc.backends.compiled.cache import choose_type
from llmc.backends.compiled.obstacles import obstacle
from llmc.config import CacheType
from llmc.graph.model import Graph
from tests.passes.harness import latent_attention, run_pass


def choose(graph: Graph, wanted: CacheType) -> CacheType:
    reasons = {node: why for node in graph.graph if (why := obstacle(node)) is not None}
    return choose_type(graph, wanted, reasons)


def test_latents_stay_in_float32() -> None:
    graph = latent_attention()
    run_pass("latent-attention", graph)
    assert choose(graph, CacheType.FLOAT16) is CacheType.FLOAT32
    assert graph.notes[-1] == (
        "the KV cache stays in float32, not float16: it has one latent per token, for all heads"
    )


def test_attention_in_plain_operators_stays_in_float32() -> None:
    graph = latent_attention()
    before = len(graph.notes)
    assert choose(graph, CacheType.FLOAT32) is CacheType.FLOAT32
    assert graph.notes[before:] == []
    assert choose(graph, CacheType.INT8) is CacheType.FLOAT32
    assert graph.notes[before:] == [
        "the KV cache stays in float32, not int8: ONNX Runtime reads the cache of 3 of 3 layers; in layer 0, "
        "attention is in plain operators"
    ]
