"""Attention layers over KV caches of every type: a graph, its session, and the same by NumPy in float64."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.backends.compiled.program import SAME_TOKENS
from llmc.config import CacheType
from llmc.graph.interface import CacheSlot
from llmc.graph.model import CHUNK, Graph
from tests.backends.compiled.graphs import MICROSOFT, Array, GraphBuilder

POSITIONS = 160
DTYPES = {CacheType.FLOAT32: np.float32, CacheType.FLOAT16: np.float16, CacheType.INT8: np.int8}
#: Distance of neighbouring numbers of a row, as a fraction of its largest.
STEPS = {CacheType.FLOAT32: 1e-6, CacheType.FLOAT16: 1e-3, CacheType.INT8: 1.01 / 127}
#: Bytes after an int8 row's codes: its scale, a float32.
SCALE = 4


@dataclass(frozen=True)
class Layer:
    """One attention: its geometry, and what its scores go through."""

    heads: int
    kv_heads: int
    width: int
    rotated: int = 0
    interleaved: bool = False
    window: int = -1
    softcap: float = 0.0
    chunk: int = 0
    sinks: tuple[float, ...] = ()

    def first_seen(self, stop: int) -> int:
        """The first position that the query at stop - 1 sees."""
        if self.chunk:
            return (stop - 1) // self.chunk * self.chunk
        return max(0, stop - self.window) if self.window > 0 else 0


#: The sink of a head that has none, as the tracer writes it.
NOTHING = float(np.finfo(np.float32).min)
LAYERS = (
    Layer(6, 2, 32, rotated=32, sinks=(NOTHING, -2.0, 0.0, 1.5, 4.0, 90.0)),
    Layer(4, 4, 16, window=20, softcap=5.0),
    Layer(3, 1, 64, rotated=32, interleaved=True, sinks=(0.5, 3.0, -1.0)),
)
#: A layer that reads the cache of LAYERS[1]; its output is the last.
SHARER = Layer(4, 4, 16, chunk=24, sinks=(1.0, 2.0, 0.0, -1.0))


def tables(rotated: int) -> tuple[Array, Array]:
    angles = np.arange(POSITIONS)[:, None] / 50.0 ** (np.arange(rotated // 2) / rotated * 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def attention_graph(smooth: str = "") -> Graph:
    """Every layer of LAYERS beside the others, with inputs and a cache of its own; and SHARER.

    Args:
        smooth: Name of the node that gets a smooth softmax, which no kernel computes.
    """
    builder = GraphBuilder()
    int32 = ir.DataType.INT32
    lengths = [builder.value("lengths", ["batch"], int32), builder.value("total", [], int32)]
    outputs: list[ir.Value] = []
    slots = []
    for i, layer in enumerate(LAYERS):
        kv = layer.kv_heads * layer.width
        rows = [
            builder.input(f"{n}{i}", w) for n, w in (("q", layer.heads * layer.width), ("k", kv), ("v", kv))
        ]
        shape = ["batch", layer.kv_heads, "past", layer.width]
        pasts = [builder.value(f"past{i}.{n}", list(shape)) for n in "kv"]
        shape[2] = "total"
        presents = [builder.value(f"present{i}.{n}", list(shape)) for n in "kv"]
        builder.inputs += pasts
        inputs: list[ir.Value | None] = [*rows, *pasts, *lengths]
        attributes: dict[str, object] = {
            "num_heads": layer.heads,
            "kv_num_heads": layer.kv_heads,
            "local_window_size": layer.window,
            "softcap": layer.softcap,
        }
        if layer.rotated:
            cos, sin = tables(layer.rotated)
            inputs += builder.weight(f"tables{i}", {"cos": cos, "sin": sin})
            attributes |= {"do_rotary": 1, "rotary_interleaved": int(layer.interleaved)}
        if layer.sinks:
            inputs += [None] * (11 - len(inputs)) + _sinks(builder, layer, f"sinks{i}")
        out = builder.value(f"out{i}", ["batch", "sequence", layer.heads * layer.width])
        node = ir.node(
            "GroupQueryAttention",
            inputs,
            attributes,
            domain=MICROSOFT,
            outputs=[out, *presents],
            name=f"a{i}",
        )
        builder.nodes.append(node)
        outputs += [out, *presents]
        names = (f"past{i}.k", f"past{i}.v", f"present{i}.k", f"present{i}.v")
        slots.append(CacheSlot(
            layer=i, past_key=names[0], past_value=names[1], present_key=names[2], present_value=names[3],
            kv_heads=layer.kv_heads, key_width=layer.width, value_width=layer.width, window=None,
        ))  # fmt: skip
    builder.inputs += lengths
    query, empty = (
        builder.input("qs", 64),
        builder.weight("empty", {"rows": np.zeros((1, 0, 64), np.float32)}),
    )
    caches: list[ir.Value] = list(builder.nodes[1].outputs[1:])
    shared: list[ir.Value | None] = [query, *empty, *empty, *caches, *lengths]
    shared += [None] * 4 + _sinks(builder, SHARER, "sinkss")
    out = builder.value("outs", ["batch", "sequence", 64])
    attributes = {"num_heads": 4, "kv_num_heads": 4}
    node = ir.node("GroupQueryAttention", shared, attributes, domain=MICROSOFT, outputs=[out], name="shared")
    node.metadata_props[CHUNK] = str(SHARER.chunk)
    builder.nodes.append(node)
    outputs.append(out)
    for node in builder.nodes:
        if node.name == smooth:
            node.attributes["smooth_softmax"] = ir.AttrInt64("smooth_softmax", 1)
    graph = builder.finish(outputs)
    graph.cache = tuple(slots)
    return graph


def _sinks(builder: GraphBuilder, layer: Layer, name: str) -> list[ir.Value | None]:
    return [*builder.weight(name, {"value": np.array(layer.sinks, np.float32)})]


@dataclass
class Kernels:
    """A session.

    Args:
        cache: Type of its keys and values.
        exact: Whether it is the one that rounds nothing.
    """

    cache: CacheType
    session: object
    exact: bool = False

    @property
    def extra(self) -> int:
        return SCALE if self.cache is CacheType.INT8 else 0

    def empty(self, layer: Layer, batch: int, slots: int) -> Array:
        return np.zeros((batch, layer.kv_heads, slots, layer.width + self.extra), DTYPES[self.cache])

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        """The outputs; SHARER has the query of its owner unless it is given."""
        return self.session.run(None, {"qs": feeds["q1"], **feeds})  # type: ignore[attr-defined, no-any-return]

    def integers(self, layer: Layer, sequence: int) -> bool:
        """Whether queries are rounded to 8 bits: few of them, heads as wide as whole registers."""
        few = sequence <= 8 and sequence * layer.heads // layer.kv_heads <= 64
        return self.cache is CacheType.INT8 and layer.width % 64 == 0 and few and not self.exact

    def codes(self, sequence: int) -> bool:
        """Whether queries, keys, values and weights are rounded to 12 and 13 bits: many queries."""
        return sequence > SAME_TOKENS and not self.exact

    def numbers(self, rows: Array) -> Array:
        """What rows of the cache stand for."""
        if self.cache is not CacheType.INT8:
            return rows.astype(np.float64)
        scales = np.ascontiguousarray(rows[..., -SCALE:]).view(np.float32)
        return rows[..., :-SCALE].astype(np.float64) * scales

    def rounded(self, x: Array) -> Array:
        """Rows of float32 as the cache holds them."""
        if self.cache is CacheType.FLOAT16:
            return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float64)
        if self.cache is CacheType.INT8:
            peak = np.abs(x).max(-1, keepdims=True)
            scale = np.where(peak > 1e-30, peak / np.float32(127), 0)
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                codes = np.where(peak > 1e-30, np.rint(x * (np.float32(127) / peak)), 0)
            return codes.astype(np.float64) * scale
        return x.astype(np.float64)


def rotated(layer: Layer, x: Array, positions: Array) -> Array:
    """(batch, heads, sequence, width) at positions (batch, sequence)."""
    if not layer.rotated:
        return x
    half = layer.rotated // 2
    cos, sin = (t[positions][:, None] for t in tables(layer.rotated))
    low = slice(0, layer.rotated, 2) if layer.interleaved else slice(0, half)
    high = slice(1, layer.rotated, 2) if layer.interleaved else slice(half, layer.rotated)
    out = x.copy()
    out[..., low] = x[..., low] * cos - x[..., high] * sin
    out[..., high] = x[..., high] * cos + x[..., low] * sin
    return out


def heads_of(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def attend(layer: Layer, query: Array, keys: Array, values: Array, seen: list[list[range]]) -> Array:
    """Softmax over what each token of each row sees, and over the sink of each head.

    Args:
        keys, values: (batch, kv_heads, slots, width).
    """
    batch, heads, sequence, width = query.shape
    out = np.zeros((batch, sequence, heads, width))
    for b in range(batch):
        for h in range(heads):
            for s in range(sequence):
                part = slice(seen[b][s].start, seen[b][s].stop)
                k, v = (x[b, h // (heads // layer.kv_heads), part] for x in (keys, values))
                scores = k @ query[b, h, s].astype(np.float64) * width**-0.5
                if layer.softcap:
                    scores = layer.softcap * np.tanh(scores / layer.softcap)
                sink = np.float64(layer.sinks[h]) if layer.sinks else -np.inf
                top = max(scores.max(), sink)
                p = np.exp(scores - top)
                out[b, s, h] = p @ v / (p.sum() + np.exp(sink - top))
    return out.reshape(batch, sequence, heads * width)
