"""Attention over KV caches of every type against NumPy: shapes, extremes, ends of the cache."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.artifact.manifest import MODEL
from llmc.backends.compiled.isa import InstructionSet
from llmc.backends.compiled.lower import compile_kernels
from llmc.backends.compiled.program import SAME_TOKENS
from llmc.backends.compiled.toolchain import find_compiler
from llmc.config import CacheType
from llmc.graph.interface import CacheSlot
from llmc.graph.model import CHUNK, Graph
from llmc.runtime.arithmetic import Arithmetic, compute_in
from tests.backends.compiled.graphs import (
    MICROSOFT,
    Array,
    GraphBuilder,
    open_session,
    usable_sets,
    write_compiled,
)

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

    def first_seen(self, stop: int) -> int:
        """The first position that the query at stop - 1 sees."""
        if self.chunk:
            return (stop - 1) // self.chunk * self.chunk
        return max(0, stop - self.window) if self.window > 0 else 0


LAYERS = (
    Layer(6, 2, 32, rotated=32),
    Layer(4, 4, 16, window=20, softcap=5.0),
    Layer(3, 1, 64, rotated=32, interleaved=True),
)
#: A layer that reads the cache of LAYERS[1]; its output is the last.
SHARER = Layer(4, 4, 16, chunk=24)


def tables(rotated: int) -> tuple[Array, Array]:
    angles = np.arange(POSITIONS)[:, None] / 50.0 ** (np.arange(rotated // 2) / rotated * 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def attention_graph(sinks: bool = False, sharer_sinks: bool = False) -> Graph:
    """Every layer of LAYERS beside the others, with inputs and a cache of its own; and SHARER."""
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
        if sinks and i == 1:
            inputs += [None] * (11 - len(inputs))
            inputs += builder.weight("sinks", {"value": np.zeros(layer.heads, np.float32)})
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
    if sharer_sinks:
        shared += [None] * 4 + builder.weight("sinks", {"value": np.zeros(4, np.float32)})
    out = builder.value("outs", ["batch", "sequence", 64])
    attributes = {"num_heads": 4, "kv_num_heads": 4}
    node = ir.node("GroupQueryAttention", shared, attributes, domain=MICROSOFT, outputs=[out], name="shared")
    node.metadata_props[CHUNK] = str(SHARER.chunk)
    builder.nodes.append(node)
    outputs.append(out)
    graph = builder.finish(outputs)
    graph.cache = tuple(slots)
    return graph


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


#: float32 is what the tests of whole decoders run with.
NARROW = (CacheType.FLOAT16, CacheType.INT8)
SERVED, PRODUCTS, EXACT = Arithmetic
SETS = [
    (usable_sets()[0], CacheType.FLOAT32, SERVED),
    *((isa, cache, SERVED) for isa in usable_sets() for cache in NARROW),
    *((isa, cache, EXACT) for isa in usable_sets() for cache in NARROW),
    *((usable_sets()[0], cache, PRODUCTS) for cache in NARROW),
]


@pytest.fixture(scope="module", params=SETS, ids=lambda p: f"{p[0].name}-{p[1].value}-{p[2].value}")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    isa: InstructionSet
    isa, cache, arithmetic = request.param
    folder = tmp_path_factory.mktemp("attention")
    graph = attention_graph()
    made = write_compiled(graph, folder, isa, cache)
    assert (made.regions, made.nodes, made.outside) == (1, len(LAYERS) + 1, ())
    assert {slot.key_width - layer.width for slot, layer in zip(graph.cache, LAYERS, strict=True)} == {
        SCALE if cache is CacheType.INT8 else 0
    }
    if arithmetic is not SERVED:
        model = ir.load(folder / MODEL)
        compute_in(arithmetic, model, graph.interface())
        ir.save(model, folder / MODEL)
    held = CacheType.FLOAT32 if arithmetic is EXACT else cache
    return Kernels(held, open_session(folder, threads=2), exact=arithmetic is EXACT)


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
    """Softmax over what each token of each row sees; keys and values (batch, kv_heads, slots, width)."""
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
                p = np.exp(scores - scores.max())
                out[b, s, h] = p @ v / p.sum()
    return out.reshape(batch, sequence, heads * width)


def compare(
    kernels: Kernels, rng: np.random.Generator, pasts: list[int], sequence: int, spare: int, scale: float
) -> None:
    """One step after `pasts` tokens of each row, in a cache with `spare` slots more than needed."""
    batch, total = len(pasts), max(pasts) + sequence
    counts = np.array([p + sequence for p in pasts])
    if max(pasts) == 0:  # prompts of unequal length, padded on the right
        counts = rng.integers(1, sequence + 1, batch)
        counts[0] = sequence
    feeds: dict[str, Array] = {
        "lengths": (counts - 1).astype(np.int32), "total": np.array(total, np.int32)
    }  # fmt: skip
    fresh: list[tuple[Array, ...]] = []
    for i, layer in enumerate(LAYERS):
        parts = [
            (rng.standard_normal((batch, sequence, h * layer.width)) * scale).astype(np.float32)
            for h in (layer.heads, layer.kv_heads, layer.kv_heads)
        ]
        parts[0] /= np.float32(scale * scale)  # scores of usual size
        fresh.append(tuple(parts))
        feeds |= {f"{n}{i}": part for n, part in zip("qkv", parts, strict=True)}
        slots = max(pasts) + spare if max(pasts) else 0
        for name in "kv":
            past = kernels.empty(layer, batch, slots)
            numbers = rng.standard_normal((*past.shape[:3], layer.width)).astype(np.float32) * np.float32(
                scale
            )
            feeds[f"past{i}.{name}"] = stored(kernels, numbers)
    found = kernels.run(feeds)
    positions = np.array(pasts)[:, None] + np.arange(sequence)
    for i, layer in enumerate(LAYERS):
        out, *presents = found[3 * i : 3 * i + 3]
        q, k, v = (
            heads_of(x, n)
            for x, n in zip(fresh[i], (layer.heads, layer.kv_heads, layer.kv_heads), strict=True)
        )
        q, k = (rotated(layer, x, positions) for x in (q, k))
        for present in presents:
            for b, past in enumerate(pasts):
                present[b, :, past + sequence :] = 0  # memory that nothing was written to
        for name, present, new in (("k", presents[0], k), ("v", presents[1], v)):
            assert present.shape[2] == max(feeds[f"past{i}.{name}"].shape[2], total)
            expected = kernels.rounded(new)
            for b, past in enumerate(pasts):
                old = feeds[f"past{i}.{name}"][b, :, :past]
                np.testing.assert_array_equal(present[b, :, :past], old)
                appended = kernels.numbers(present[b, :, past : past + sequence])
                # A number on a border may be rounded to the other side.
                step = np.abs(new[b]).max(-1, keepdims=True) * STEPS[kernels.cache]
                assert (np.abs(appended - expected[b]) <= step).all()
                assert np.linalg.norm(appended - expected[b]) <= 2e-3 * np.linalg.norm(expected[b])
        seen = seen_by(layer, pasts, counts, sequence)
        if i == 1:
            shared = [kernels.numbers(x) for x in presents]
            expected = attend(SHARER, q, *shared, seen_by(SHARER, pasts, counts, sequence))
            assert np.linalg.norm(found[-1] - expected) <= 1e-3 * np.linalg.norm(expected)
        keys, values = (kernels.numbers(x) for x in presents)
        if not kernels.integers(layer, sequence):
            expected = attend(layer, q, keys, values, seen)
            if kernels.codes(sequence):
                assert np.linalg.norm(out - expected) <= 1e-3 * np.linalg.norm(expected)
            else:
                np.testing.assert_allclose(out, expected, rtol=1e-4, atol=3e-5 * scale)
            continue
        # The reference rounds a number of the query that lies on a border now and then to the other side.
        expected = attend(layer, kernels.rounded(q), keys, values, seen)
        assert np.linalg.norm(out - expected) <= 2e-3 * np.linalg.norm(expected)


def seen_by(layer: Layer, pasts: list[int], counts: Array, sequence: int) -> list[list[range]]:
    """What each token of each row sees; padding sees the keys that exist."""
    stops = [[min(p + s + 1, int(counts[b])) for s in range(sequence)] for b, p in enumerate(pasts)]
    return [[range(layer.first_seen(stop), stop) for stop in row] for row in stops]


def stored(kernels: Kernels, x: Array) -> Array:
    """Rows of float32 in the type of the cache, by NumPy."""
    if kernels.cache is not CacheType.INT8:
        return x.astype(DTYPES[kernels.cache])
    scales = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
    codes = np.rint(x / scales).astype(np.int8)
    return np.concatenate([codes, scales.view(np.int8)], axis=-1)


@settings(max_examples=12, deadline=None)
@given(
    pasts=st.lists(st.integers(0, 80), min_size=1, max_size=3),
    sequence=st.integers(1, 70),
    spare=st.integers(0, 80),
    seed=st.integers(0, 2**32 - 1),
    power=st.floats(-3, 3),
)
def test_shapes(
    kernels: Kernels, pasts: list[int], sequence: int, spare: int, seed: int, power: float
) -> None:
    compare(kernels, np.random.default_rng(seed), pasts, sequence, spare, 10**power)


EXTREMES = {
    "zeros": lambda n: np.zeros(n),
    "largest": lambda n: np.where(np.arange(n) % 2, 6e4, -6e4),
    "outlier": lambda n: np.where(np.arange(n) == 5, 1e4, 1e-3),
    "denormal": lambda n: np.full(n, 1e-40),
}


@pytest.mark.parametrize("sequence", [1, 40])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(kernels: Kernels, name: str, sequence: int) -> None:
    """Keys and values that are all extreme: the result is one of the values, however scores come out."""
    feeds: dict[str, Array] = {
        "lengths": np.array([sequence - 1], np.int32), "total": np.array(sequence, np.int32)
    }  # fmt: skip
    for i, layer in enumerate(LAYERS):
        row = np.tile(EXTREMES[name](layer.width), (1, sequence, layer.kv_heads)).astype(np.float32)
        feeds |= {f"k{i}": row, f"v{i}": row}
        feeds[f"q{i}"] = np.full((1, sequence, layer.heads * layer.width), 1e-6, np.float32)
        feeds |= {f"past{i}.{n}": kernels.empty(layer, 1, 0) for n in "kv"}
    found = kernels.run(feeds)
    for i, layer in enumerate(LAYERS):
        value = kernels.rounded(EXTREMES[name](layer.width).astype(np.float32)[None])[0]
        expected = np.tile(value, (1, sequence, layer.heads))
        # Codes of 12 bits are of nothing below 2**-72.
        rounding = np.abs(value).max() * 2.0**-12 + 2.0**-72 if kernels.codes(sequence) else 1e-42
        np.testing.assert_allclose(found[3 * i], expected, rtol=2e-6, atol=rounding)


def test_numbers_beyond_float16_become_its_largest(kernels: Kernels) -> None:
    step = {"lengths": np.zeros(1, np.int32), "total": np.array(1, np.int32)}
    feeds: dict[str, Array] = dict(step)
    for i, layer in enumerate(LAYERS):
        row = np.full((1, 1, layer.kv_heads * layer.width), -1e30, np.float32)
        query = np.zeros((1, 1, layer.heads * layer.width), np.float32)
        feeds |= {f"q{i}": query, f"k{i}": row, f"v{i}": row}
        feeds |= {f"past{i}.{n}": kernels.empty(layer, 1, 0) for n in "kv"}
    largest = -65504 if kernels.cache is CacheType.FLOAT16 else -1e30
    for i in range(len(LAYERS)):
        np.testing.assert_allclose(kernels.run(feeds)[3 * i], largest, rtol=1e-6)


def test_ends_of_the_cache(kernels: Kernels) -> None:
    """No token before; one; a cache whose last slot is taken; one token more than it has slots."""
    for past, sequence in ((0, 1), (1, 1), (1, 9), (40, 1)):
        compare(kernels, np.random.default_rng(past), [past], sequence, sequence, 1.0)
    feeds = feeds_of_zeros(kernels, past=4, slots=5)
    kernels.run(feeds)
    feeds["lengths"] += 1
    with pytest.raises(Exception, match="the KV cache has fewer slots than seqlens_k asks for"):
        kernels.run(feeds)


def test_rows_of_another_width_are_an_error(kernels: Kernels) -> None:
    feeds = feeds_of_zeros(kernels, past=4, slots=5)
    feeds["past2.v"] = feeds["past2.v"][..., :-1].copy()
    with pytest.raises(Exception, match=r"Got invalid dimensions for input: past2\.v"):
        kernels.run(feeds)


def test_threads_do_not_change_a_bit(kernels: Kernels) -> None:
    rng = np.random.default_rng(5)
    feeds = feeds_of_zeros(kernels, past=140, slots=150)
    for name, value in feeds.items():
        if name[0] in "qkv":
            feeds[name] = rng.standard_normal(value.shape).astype(np.float32)
    folder = Path(kernels.session._model_path).parent  # type: ignore[attr-defined]
    expected = kernels.run(feeds)
    for threads in (1, 5):
        found = open_session(folder, threads=threads).run(None, {"qs": feeds["q1"], **feeds})
        for i in range(0, len(found), 3):
            np.testing.assert_array_equal(found[i], expected[i])


def feeds_of_zeros(kernels: Kernels, past: int, slots: int) -> dict[str, Array]:
    """One token after `past`."""
    feeds: dict[str, Array] = {"lengths": np.array([past], np.int32), "total": np.array(past + 1, np.int32)}
    for i, layer in enumerate(LAYERS):
        for name, heads in zip("qkv", (layer.heads, layer.kv_heads, layer.kv_heads), strict=True):
            feeds[f"{name}{i}"] = np.zeros((1, 1, heads * layer.width), np.float32)
        feeds |= {f"past{i}.{n}": kernels.empty(layer, 1, slots) for n in "kv"}
    return feeds


@pytest.mark.parametrize("where", ["sinks", "sharer_sinks"])
def test_one_layer_without_kernels_keeps_every_cache_in_float32(where: str) -> None:
    graph = attention_graph(**{where: True})
    before = graph.cache
    made = compile_kernels(graph, usable_sets()[0], find_compiler(), CacheType.INT8)
    assert graph.cache == before
    assert {spec.dtype for spec in graph.interface().inputs if spec.name.startswith("past")} == {"float32"}
    why = "it has a bias or sinks"
    assert made.outside == (("GroupQueryAttention", why, 1),)
    assert graph.notes == [
        "the KV cache stays in float32, not int8: ONNX Runtime reads that of 1 of 3 layers; in layer 1, "
        f"attention stays outside of kernels: {why}"
    ]
