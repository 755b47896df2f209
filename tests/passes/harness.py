"""Tiny models lowered pass by pass in float32, and what tests of several passes have in common."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedModel

from llmc.config import Dtype
from llmc.graph.match import find_nodes
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport
from llmc.graph.serial import load_graph
from llmc.graph.verify import verify_graph
from llmc.passes import registered_passes
from llmc.passes._norms import Norm, match_norm, squared
from tests.caches import shared_trace
from tests.lowering import tiny, traced
from tests.models import build_tiny_model
from tests.state_store import StateStore, run_steps

LAYERS = 3
#: The passes of targets for ONNX Runtime that build on each other.
ORDER = (
    "linear",
    "rms-norm",
    "layer-norm",
    "rotary",
    "group-query-attention",
    "pack-qkv",
    "pack-gate-up",
    "skip-norm",
    "activation",
)


def graph_of(model_type: str, passes: Sequence[str] = ()) -> Graph:
    """The traced graph with the weights of the tiny model, after `passes`."""
    graph = load_graph(traced(model_type, Dtype.FLOAT32))
    graph.bind(StateStore(tiny(model_type)), {})
    for name in passes:
        run_pass(name, graph)
    return graph


def run_pass(name: str, graph: Graph) -> PassReport:
    """Run one pass and verify the graph."""
    report = registered_passes()[name].run(graph)
    verify_graph(graph)
    return report


def graph_before(name: str, model_type: str) -> Graph:
    """The graph after the passes of `ORDER` that come before `name`."""
    return graph_of(model_type, ORDER[: ORDER.index(name)])


def lowered(
    name: str, model_type: str, before: Sequence[str] | None = None
) -> tuple[Graph, Graph, PassReport]:
    """The graph before and after a pass, and its report.

    Args:
        before: The passes that run first; those of `graph_before` if None.
    """
    earlier = ORDER[: ORDER.index(name)] if before is None else before
    after = graph_of(model_type, earlier)
    report = run_pass(name, after)
    return graph_of(model_type, earlier), after, report


def operators(graph: Graph) -> Counter[str]:
    """How often each operator is in the graph, by its name."""
    return Counter(node.op_type for node in graph.graph)


def counts(report: PassReport) -> tuple[list[int], int]:
    """Applications in each layer and outside of the layers, of a pass that declined nowhere."""
    assert report.refusals == ()
    return [report.in_layer(i) for i in range(LAYERS)], report.applied.count(None)


def logits_of(graph: Graph, length: int = 18, prompt: int = 12) -> np.ndarray:
    """Logits of two random rows, after a prompt and one token at a time."""
    ids = np.random.default_rng(0).integers(3, 250, (2, length))
    positions = np.tile(np.arange(length), (2, 1))
    return run_steps(graph, ids, np.ones_like(ids), positions, prompt=prompt)


def hold_numbers(before: Graph, after: Graph, atol: float = 1e-4) -> None:
    """Hold that two graphs have the same logits."""
    np.testing.assert_allclose(logits_of(after), logits_of(before), atol=atol)


def hold_refusal(name: str, graph: Graph, spoil: Callable[[Graph], None], code: str, kept: str) -> None:
    """Hold that a pass declines in layer 1 with `code` after `spoil`, and leaves an operator `kept`."""
    spoil(graph)
    report = registered_passes()[name].run(graph)
    assert {(r.code, r.layer) for r in report.refusals} >= {(code, 1)}
    assert all(r.reason and r.node for r in report.refusals)
    assert in_layer(graph, kept) is not None


def in_layer(graph: Graph, op: str, layer: int = 1) -> ir.Node:
    """The first `op` of a layer."""
    return next(n for n in graph.graph if n.op_type == op and layer_of(n) == layer)


def copy_of(graph: Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    """The same value by another name."""
    node = ir.Node("", "Identity", [value], num_outputs=1, name=f"{value.name}/again")
    node.outputs[0].name = f"{value.name}/copy"
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    graph.graph.insert_before(before, node)
    return node.outputs[0]


def scale_another_tensor(graph: Graph) -> None:
    """Let the first norm of layer 1 scale a copy of what it takes the mean square of."""
    mean = next(n for n in find_nodes(graph.graph, "ReduceMean") if layer_of(n) == 1 and squared(n.inputs[0]))
    norm = match_norm(mean)
    assert isinstance(norm, Norm)
    x = squared(mean.inputs[0])
    assert x is not None
    for user, index in list(x.uses()):
        if user.op_type in ("Mul", "Div") and user.inputs[0] is not user.inputs[1]:
            user.replace_input_with(index, copy_of(graph, x, user))


def turn_by_the_mask(graph: Graph) -> None:
    """Let rotary embeddings turn by the attention mask in place of the positions."""
    inputs = {str(v.name): v for v in graph.graph.inputs}
    ir.convenience.replace_all_uses_with(inputs["position_ids"], inputs["attention_mask"])


def latent_attention(**overrides: int) -> Graph:
    """The traced graph of a tiny model with multi-head latent attention."""
    return with_fields("deepseek_v3", num_hidden_layers=LAYERS, **overrides)


def with_fields(model_type: str, **overrides: Any) -> Graph:
    """The traced graph of a tiny model with some fields of its config changed."""
    model, traced_model = _traced_with(model_type, json.dumps(overrides))
    graph = load_graph(traced_model)
    graph.bind(StateStore(model), {})
    return graph


@cache
def _traced_with(model_type: str, overrides: str) -> tuple[PreTrainedModel, bytes]:
    model = build_tiny_model(model_type, **json.loads(overrides))
    return model, shared_trace(model.config, Dtype.FLOAT32)


def shared_cache() -> Graph:
    """A graph whose last two of four layers read the caches of the first two, one with a window."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return with_fields(
        "gemma3n_text",
        num_hidden_layers=4,
        layer_types=kinds,
        num_kv_shared_layers=2,
        intermediate_size=96,
        activation_sparsity_pattern=[0.0] * 4,
    )


def chunked_attention() -> Graph:
    """A graph whose first and last layer see chunks of 4 tokens."""
    return with_fields(
        "llama4_text",
        attention_chunk_size=4,
        attn_temperature_tuning=False,
        layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        no_rope_layers=[1, 0, 1],
        intermediate_size_mlp=96,
        moe_layers=[],
    )


def hold_ragged_numbers(graph: Graph, lowered: Graph) -> None:
    """Hold that rows of unequal length, padded on the right, have the same logits in two graphs."""
    ids = np.random.default_rng(1).integers(3, 250, (3, 19))
    mask = np.ones_like(ids)
    mask[0, 9:12], mask[1, 3:12] = 0, 0
    positions = np.clip(mask.cumsum(1) - 1, 0, None)
    expected, found = (run_steps(g, ids, mask, positions, prompt=12) for g in (graph, lowered))
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-4)
