"""A smallest valid `Graph`, built by hand: embedding, one attention, head."""

import numpy as np
import onnx_ir as ir

from llmc.graph import dialect
from llmc.graph.domains import DIALECT, OPSET, VERSION
from llmc.graph.interface import CacheSlot
from llmc.graph.model import LAYER, Graph, Placeholder

VOCAB, HIDDEN = 11, 8


def value(name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def weight(name: str, *shape: int) -> ir.Value:
    made = value(name, list(shape))
    made.const_value = Placeholder(name, ir.DataType.FLOAT, shape)
    return made


def constant(name: str, data: list[int]) -> ir.Value:
    made = value(name, [len(data)], ir.DataType.INT64)
    made.const_value = ir.tensor(np.array(data, np.int64), name=name)
    return made


def node(op: str, inputs: list[ir.Value], output: ir.Value, **attrs: object) -> ir.Node:
    return ir.Node(
        "",
        op,
        inputs,
        ir.convenience.convert_attributes(attrs),  # type: ignore[arg-type]
        outputs=[output],
        name=f"node/{output.name}",
    )


def tiny_graph() -> Graph:
    """Embedding tied to the head, one layer of attention over the embeddings themselves."""
    slot = CacheSlot(
        layer=0,
        past_key="past_key_values.0.key",
        past_value="past_key_values.0.value",
        present_key="present.0.key",
        present_value="present.0.value",
        kv_heads=1,
        key_width=HIDDEN,
        value_width=HIDDEN,
        window=None,
    )
    ids = value("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    mask = value("attention_mask", ["batch", "total"], ir.DataType.INT64)
    past = [value(n, ["batch", 1, "past", HIDDEN]) for n in (slot.past_key, slot.past_value)]
    present = [value(n, ["batch", 1, "total", HIDDEN]) for n in (slot.present_key, slot.present_value)]
    table = weight("model.embed_tokens.weight", VOCAB, HIDDEN)
    axes, target = constant("axes", [1]), constant("target", [0, 0, HIDDEN])
    hidden = value("hidden", ["batch", "sequence", HIDDEN])
    heads = value("heads", ["batch", 1, "sequence", HIDDEN])
    mixed = value("mixed", ["batch", "sequence", 1, HIDDEN])
    merged = value("merged", ["batch", "sequence", HIDDEN])
    turned = value("turned", [HIDDEN, VOCAB])
    logits = value("logits", ["batch", "sequence", VOCAB])
    attention = ir.Node(
        DIALECT,
        dialect.CACHED_ATTENTION,
        [heads, heads, heads, *past, mask],
        ir.convenience.convert_attributes(
            {"num_heads": 1, "kv_num_heads": 1, "scale": 0.5, "softcap": 0.0, "window": 0, "chunk": 0}
        ),
        outputs=[mixed, *present],
        name="attention",
        metadata_props={LAYER: "0"},
    )
    nodes = [
        node("Gather", [table, ids], hidden, axis=0),
        node("Unsqueeze", [hidden, axes], heads),
        attention,
        node("Reshape", [mixed, target], merged),
        node("Transpose", [table], turned, perm=[1, 0]),
        node("MatMul", [merged, turned], logits),
    ]
    graph = ir.Graph(
        [ids, mask, *past],
        [logits, *present],
        nodes=nodes,
        initializers=[table, axes, target],
        name="decoder",
        opset_imports={"": OPSET, DIALECT: VERSION},
    )
    model = ir.Model(graph, ir_version=10, functions=[dialect.cached_attention(sinks=False)])
    aliases = dict.fromkeys(
        ("lm_head.weight", table.name or ""), ("lm_head.weight", "model.embed_tokens.weight")
    )
    return Graph(model=model, cache=(slot,), layers=1, max_length=64, aliases=aliases)
