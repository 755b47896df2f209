"""Graphs whose step can be one CUDA graph accept a mask of the whole KV cache, as they are fed then."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from llmc.backends.onnxruntime.cuda_graph import follow_static_mask, graph_obstacle
from llmc.graph.model import Graph
from tests.passes.harness import ORDER, chunked_attention, graph_of, run_pass, with_fields

CAPACITY = 24
PASSES = (*ORDER[:5], "experts", "states", *ORDER[5:], "last-token-logits")


def prepared(graph: Graph) -> Graph:
    """The graph as a target for CUDA has it, in float32."""
    for name in PASSES:
        run_pass(name, graph)
    return graph


def switched_rotary() -> Graph:
    """Return a graph whose rotary embedding takes other frequencies from position 12 on."""
    half = 16 // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [2.0] * half,
        "original_max_position_embeddings": 12,
        "partial_rotary_factor": 1.0,
    }
    return with_fields("phi3", rope_parameters=rope, max_position_embeddings=64)


MODELS: dict[str, Callable[[], Graph]] = {
    "llama": lambda: graph_of("llama"),
    "windows": lambda: graph_of("gemma3_text"),
    "switched rotary embedding": switched_rotary,
    "experts": lambda: graph_of("qwen3_moe"),
    "states": lambda: graph_of("qwen3_next"),
    "learned positions": lambda: graph_of("gpt2"),
}


def open_session(graph: Graph) -> ort.InferenceSession:
    data = ir.to_proto(graph.model).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(
    session: ort.InferenceSession, graph: Graph, steps: Sequence[int], mask: np.ndarray, *, static: bool
) -> list[np.ndarray]:
    """Return the logits of each step over a cache of `CAPACITY` slots.

    Args:
        session: A session of the graph.
        steps: Number of tokens of each step.
        mask: (rows, sum of `steps`), 0 at the padding of the first step.
        static: Whether the mask has all slots of the cache, as onnxruntime-genai feeds it for CUDA graphs.
    """
    ids = np.random.default_rng(0).integers(3, 250, mask.shape)
    wanted, names = {i.name for i in session.get_inputs()}, [o.name for o in session.get_outputs()]
    kept = {s.past: np.zeros((len(ids), *s.shape), np.float32) for s in graph.states}
    for slot in graph.cache:
        for past in slot.pasts:
            kept[past] = np.zeros((len(ids), slot.kv_heads, CAPACITY, slot.key_width), np.float32)
    logits, start = [], 0
    for length in steps:
        stop = start + length
        seen = np.zeros((len(ids), CAPACITY if static else stop), np.int64)
        seen[:, :stop] = mask[:, :stop]
        positions = np.clip(mask.cumsum(1) - 1, 0, None)[:, start:stop]
        feeds = {"input_ids": ids[:, start:stop], "attention_mask": seen, "position_ids": positions, **kept}
        fed = {name: value for name, value in feeds.items() if name in wanted}
        out = dict(zip(names, session.run(None, fed), strict=True))
        logits.append(out["logits"])
        kept = {past: out[present] for slot in graph.cache for past, present in slot.pairs}
        kept |= {state.past: out[state.present] for state in graph.states}
        start = stop
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_of_the_whole_cache_gives_the_same_bits(name: str) -> None:
    graph = prepared(MODELS[name]())
    short = ([9, *[1] * 8], np.ones((1, 17), np.int64))
    before = run(open_session(graph), graph, *short, static=False)
    assert follow_static_mask(graph) is None
    assert graph_obstacle(graph.model, graph.interface()) is None
    session = open_session(graph)
    full = [15, *[1] * 9]  # more than half of the cache, and then to its end
    ragged = np.ones((3, 24), np.int64)
    ragged[0, 9:15], ragged[2, 1:15] = 0, 0
    for steps, mask in (
        short,
        (full, np.ones((1, 24), np.int64)),
        ([9, 4, 1, 3, 1], np.ones((1, 18), np.int64)),
        (full, ragged),
        ([1] * 6, np.ones((2, 6), np.int64)),
    ):
        grown, found = (run(session, graph, steps, mask, static=static) for static in (False, True))
        for step, (expected, logits) in enumerate(zip(grown, found, strict=True)):
            np.testing.assert_array_equal(logits, expected, err_msg=f"step {step} of {steps}")
    for expected, logits in zip(before, run(session, graph, *short, static=False), strict=True):
        np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize(
    ("make", "obstacle"),
    [
        (lambda: graph_of("bloom"), "attention is in plain operators"),
        (lambda: graph_of("minimax"), "Scan is control flow"),
        (lambda: graph_of("mamba"), "there is no KV cache"),
        (chunked_attention, "Range reads the length of attention_mask"),
    ],
    ids=["plain attention", "states token by token", "only states", "chunks"],
)
def test_a_graph_that_cannot_be_captured_is_left_alone(make: Callable[[], Graph], obstacle: str) -> None:
    graph = prepared(make())
    nodes = [node.name for node in graph.graph]
    assert obstacle in str(follow_static_mask(graph))
    assert [node.name for node in graph.graph] == nodes
    assert obstacle in str(graph_obstacle(graph.model, graph.interface()))


def test_what_reads_the_end_of_a_mask_or_computes_a_size_is_an_obstacle() -> None:
    graph = prepared(graph_of("llama"))
    assert graph_obstacle(graph.model, graph.interface()) == "Slice reads the end of attention_mask"
    assert follow_static_mask(graph) is None
    ids = next(v for v in graph.graph.inputs if v.name == "input_ids")
    head = next(node for node in graph.graph if node.op_type == "MatMul")
    product = ir.node("MatMul", [head.inputs[1], head.outputs[0]])
    graph.graph.append(product)
    assert graph_obstacle(graph.model, graph.interface()) == "MatMul copies addresses to the device"
    graph.graph.remove(product, safe=True)
    size = ir.node("ReduceSum", [ids], {"keepdims": 0})
    graph.graph.extend([size, ir.node("Range", [*size.outputs, *size.outputs, *size.outputs])])
    obstacle = graph_obstacle(graph.model, graph.interface())
    assert obstacle == "Range takes a size that is computed from values"
