"""A tiny llama-like decoder written by hand in ONNX from a transformers state dict, and its faults."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from llmc.graph.interface import CacheSlot, Interface, TensorSpec
from llmc.runtime.ort_model import OrtModel
from llmc.validate.latency import Timed
from llmc.validate.roofline import streamed_weight_bytes

_TYPES = {T.INT64: "int64", T.FLOAT: "float32"}


@dataclass(frozen=True)
class Variant:
    """How the decoder is written, and what is wrong with it.

    `grouped` uses GroupQueryAttention (which allows a shared KV buffer) instead of plain operators.
    """

    logits: str = "all"
    padding: str = "any"
    position_ids: bool = False
    grouped: bool = False
    max_length: int = 160
    ignore_mask: bool = False
    ignore_window: bool = False
    shift_decode_positions: bool = False
    last_slot: bool = False
    nan_logit: bool = False
    drop_output: str | None = None
    cut_vocabulary: int = 0
    scale_weight: tuple[str, float] | None = None


class _Writer:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def __call__(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attrs: Any) -> Any:
        names = [f"{op}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, domain=domain, **attrs))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def name(self, value: str, name: str) -> str:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        return name


def write_decoder(model: Any, folder: Path, variant: Variant = Variant()) -> Interface:
    """Write model.onnx of a transformers llama or mistral; returns the interface it claims to have."""
    config = model.config
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    window = getattr(config, "sliding_window", None)
    weights = {k: v.numpy().astype(np.float32) for k, v in model.state_dict().items()}
    if variant.scale_weight is not None:
        name, factor = variant.scale_weight
        weights[name] = weights[name] * np.float32(factor)
    w = _Writer()
    ints = {n: w.constant(np.array([n], np.int64)) for n in (-1, 0, 1, 2, width // 2, width)}
    big = w.constant(np.array([1 << 40], np.int64))

    past = w("Shape", "past_key_values.0.key", start=2, end=3)
    sequence = w("Shape", "input_ids", start=1, end=2)
    if variant.grouped:  # a shared buffer has more slots than there are positions
        past = w("Sub", w("Shape", "attention_mask", start=1, end=2), sequence)
    positions = w("Sub", w("CumSum", "attention_mask", w.constant(np.int64(1))), ints[1])
    positions = w("Max", positions, w.constant(np.int64(0)))
    query_positions = w("Slice", positions, past, big, ints[1])
    if variant.position_ids:
        query_positions = "position_ids"
    if variant.shift_decode_positions:
        decoding = w("Cast", w("Greater", past, w.constant(np.int64(0))), to=T.INT64)
        query_positions = w("Add", query_positions, decoding)
    frequencies = config.rope_parameters["rope_theta"] ** -(np.arange(0, width, 2) / width)
    angles = np.outer(np.arange(config.max_position_embeddings + 1), np.tile(frequencies, 2))
    cos, sin = (
        w("Unsqueeze", w("Gather", w.constant(f(angles).astype(np.float32)), query_positions), ints[1])
        for f in (np.cos, np.sin)
    )

    slots = w(
        "Range",
        w.constant(np.int64(0)),
        w("Squeeze", w("Shape", positions, start=1)),
        w.constant(np.int64(1)),
    )
    query_slots = w("Unsqueeze", w("Slice", slots, past, big, ints[0]), ints[1])
    visible = w("GreaterOrEqual", query_slots, slots)
    real = w("Cast", "attention_mask", to=T.BOOL)
    if not variant.ignore_mask:
        visible = w("And", visible, w("Unsqueeze", real, ints[1]))
    if window is not None and not variant.ignore_window:
        distance = w("Sub", w("Unsqueeze", query_positions, ints[2]), w("Unsqueeze", positions, ints[1]))
        visible = w("And", visible, w("Less", distance, w.constant(np.int64(window))))
    visible = w("Unsqueeze", visible, ints[1])
    lengths = w("Sub", w("ReduceSum", "attention_mask", ints[1], keepdims=0), ints[1])
    lengths = w("Cast", lengths, to=T.INT32)
    total = w("Cast", w("Squeeze", w("Shape", "attention_mask", start=1, end=2)), to=T.INT32)

    def linear(x: str, name: str) -> str:
        return w("MatMul", x, w.constant(weights[name].T.copy()))

    def norm(x: str, name: str) -> str:
        power = w("ReduceMean", w("Mul", x, x), ints[-1])
        root = w("Sqrt", w("Add", power, w.constant(np.float32(config.rms_norm_eps))))
        return w("Mul", w("Div", x, root), w.constant(weights[name]))

    def split(x: str, count: int) -> str:
        return w("Transpose", w("Reshape", x, w.constant(np.array([0, 0, count, width]))), perm=[0, 2, 1, 3])

    def rotate(x: str) -> str:
        low = w("Slice", x, ints[0], ints[width // 2], w.constant(np.array([3])))
        high = w("Slice", x, ints[width // 2], ints[width], w.constant(np.array([3])))
        return w("Add", w("Mul", x, cos), w("Mul", w("Concat", w("Neg", high), low, axis=-1), sin))

    def merge(x: str) -> str:
        return w("Reshape", w("Transpose", x, perm=[0, 2, 1, 3]), w.constant(np.array([0, 0, -1])))

    def attend(layer: int, q: str, k: str, v: str) -> str:
        past_kv = [f"past_key_values.{layer}.{x}" for x in ("key", "value")]
        if variant.grouped:
            made = w(
                "GroupQueryAttention", merge(q), merge(k), merge(v), *past_kv, lengths, total,
                outputs=3, domain="com.microsoft", num_heads=heads, kv_num_heads=kv,
                local_window_size=-1 if window is None or variant.ignore_window else window,
            )  # fmt: skip
            node = w.nodes[-1]
            node.output[1], node.output[2] = f"present.{layer}.key", f"present.{layer}.value"
            return made[0]
        keys, values = (w("Concat", p, x, axis=2) for p, x in zip(past_kv, (k, v), strict=True))
        w.name(keys, f"present.{layer}.key")
        w.name(values, f"present.{layer}.value")
        spread = w.constant(np.repeat(np.arange(kv), heads // kv))
        keys, values = (w("Gather", x, spread, axis=1) for x in (keys, values))
        scores = w("MatMul", q, w("Transpose", keys, perm=[0, 1, 3, 2]))
        scores = w("Mul", scores, w.constant(np.float32(width**-0.5)))
        scores = w("Where", visible, scores, w.constant(np.float32(-1e30)))
        return merge(w("MatMul", w("Softmax", scores, axis=-1), values))

    x = w("Gather", w.constant(weights["model.embed_tokens.weight"]), "input_ids")
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            split(linear(h, f"{at}self_attn.{n}_proj.weight"), c)
            for n, c in (("q", heads), ("k", kv), ("v", kv))
        )
        x = w("Add", x, linear(attend(layer, rotate(q), rotate(k), v), at + "self_attn.o_proj.weight"))
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = linear(h, at + "mlp.gate_proj.weight")
        h = w("Mul", w("Mul", gate, w("Sigmoid", gate)), linear(h, at + "mlp.up_proj.weight"))
        x = w("Add", x, linear(h, at + "mlp.down_proj.weight"))
    x = norm(x, "model.norm.weight")
    if variant.logits == "last":
        own = w("Slice", "attention_mask", w("Neg", sequence), big, ints[1])
        slot = w("ArgMax", w("Cast", own, to=T.FLOAT), axis=1, select_last_index=1)
        chosen = w("GatherND", x, w("Unsqueeze", slot, ints[2]), batch_dims=1)
        x = w("Slice", x, ints[-1], big, ints[1]) if variant.last_slot else chosen
    head = weights["lm_head.weight"][: config.vocab_size - variant.cut_vocabulary].T.copy()
    if variant.nan_logit:
        head[:, 5] = np.nan
    w.name(w("MatMul", x, w.constant(head)), "logits")
    return _save(w, folder, variant, config, head.shape[1], window)


def _save(
    w: _Writer, folder: Path, variant: Variant, config: Any, vocabulary: int, window: int | None
) -> Interface:
    kv, width = config.num_key_value_heads, config.head_dim
    layers = range(config.num_hidden_layers)
    steps = ["batch", "sequence"]
    inputs: list[tuple[str, int, list[Any]]] = [
        ("input_ids", T.INT64, steps),
        ("attention_mask", T.INT64, ["batch", "total"]),
    ]
    if variant.position_ids:
        inputs.append(("position_ids", T.INT64, steps))
    outputs: list[tuple[str, int, list[Any]]] = [
        ("logits", T.FLOAT, ["batch", "sequence" if variant.logits == "all" else 1, vocabulary])
    ]
    slots = []
    for layer in layers:
        names = [f"{x}.{layer}.{y}" for x in ("past_key_values", "present") for y in ("key", "value")]
        inputs += [(n, T.FLOAT, ["batch", kv, "past", width]) for n in names[:2]]
        outputs += [(n, T.FLOAT, ["batch", kv, "total", width]) for n in names[2:]]
        slots.append(
            CacheSlot(
                layer=layer, past_key=names[0], past_value=names[1], present_key=names[2],
                present_value=names[3], kv_heads=kv, key_width=width, value_width=width, window=window,
            )
        )  # fmt: skip
    kept = [o for o in outputs if o[0] != variant.drop_output]
    graph = helper.make_graph(
        w.nodes,
        "decoder",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in kept],
        w.initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    return Interface(
        inputs=tuple(TensorSpec(name=n, dtype=_TYPES[t], shape=tuple(s)) for n, t, s in inputs),
        outputs=tuple(TensorSpec(name=n, dtype=_TYPES[t], shape=tuple(s)) for n, t, s in outputs),
        cache=tuple(slots),
        logits=variant.logits,
        position_ids=variant.position_ids,
        padding=variant.padding,
        max_length=variant.max_length,
    )


def timed_graph(folder: Path, interface: Interface) -> Timed:
    """The model.onnx in `folder` as latency is measured of it."""
    model = partial(OrtModel, folder, interface, threads=1, share_buffer=False)
    return Timed(model, "onnxruntime", interface, streamed_weight_bytes(folder))
