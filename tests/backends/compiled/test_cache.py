"""Attention over KV caches of every type against NumPy: shapes, extremes, ends of the cache."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.artifact.manifest import MODEL
from llmc.backends.compiled.isa import InstructionSet
from llmc.backends.compiled.lower import compile_kernels
from llmc.backends.compiled.toolchain import find_compiler
from llmc.config import CacheType
from llmc.runtime.arithmetic import Arithmetic, compute_in
from tests.backends.compiled.attention import (
    DTYPES,
    LAYERS,
    SCALE,
    SHARER,
    STEPS,
    Kernels,
    Layer,
    attend,
    attention_graph,
    heads_of,
    rotated,
)
from tests.backends.compiled.graphs import Array, open_session, usable_sets, write_compiled

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
    """Keys and values that are all extreme: the result is one of them, or the share that a sink leaves."""
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
        positions = np.arange(sequence)[None]
        query, key, value = (
            heads_of(feeds[f"{n}{i}"], h)
            for n, h in zip("qkv", (layer.heads, layer.kv_heads, layer.kv_heads), strict=True)
        )
        key, value = kernels.rounded(rotated(layer, key, positions)), kernels.rounded(value)
        seen = seen_by(layer, [0], np.array([sequence]), sequence)
        expected = attend(layer, rotated(layer, query, positions), key, value, seen)
        most = np.abs(value).max()
        # Codes of 12 bits are of nothing below 2**-72, and weights of nothing below exp(-87).
        rounding = most * 2.0**-12 + 2.0**-72 if kernels.codes(sequence) else most * 1e-37 + 1e-42
        # Rounded scores change the share of a sink.
        np.testing.assert_allclose(found[3 * i], expected, rtol=5e-3 if layer.sinks else 2e-6, atol=rounding)


def test_numbers_beyond_float16_become_its_largest(kernels: Kernels) -> None:
    step = {"lengths": np.zeros(1, np.int32), "total": np.array(1, np.int32)}
    feeds: dict[str, Array] = dict(step)
    for i, layer in enumerate(LAYERS):
        row = np.full((1, 1, layer.kv_heads * layer.width), -1e30, np.float32)
        query = np.zeros((1, 1, layer.heads * layer.width), np.float32)
        feeds |= {f"q{i}": query, f"k{i}": row, f"v{i}": row}
        feeds |= {f"past{i}.{n}": kernels.empty(layer, 1, 0) for n in "kv"}
    largest = -65504 if kernels.cache is CacheType.FLOAT16 else -1e30
    found = kernels.run(feeds)
    for i, layer in enumerate(LAYERS):
        shares = 1 / (1 + np.exp(np.array(layer.sinks or [-np.inf] * layer.heads)))
        expected = largest * np.repeat(shares, layer.width)
        np.testing.assert_allclose(found[3 * i][0, 0], expected, rtol=1e-6, atol=abs(largest) * 1e-37)


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


@pytest.mark.parametrize(
    ("smooth", "layers"), [("a1", "1 of 3 layers; in layer 1"), ("shared", "1 of 3 layers; in layer 1")]
)
def test_one_layer_without_kernels_keeps_every_cache_in_float32(smooth: str, layers: str) -> None:
    graph = attention_graph(smooth)
    before = graph.cache
    made = compile_kernels(graph, usable_sets()[0], find_compiler(), CacheType.INT8)
    assert graph.cache == before
    assert {spec.dtype for spec in graph.interface().inputs if spec.name.startswith("past")} == {"float32"}
    why = "it has a smooth softmax"
    assert made.outside == (("GroupQueryAttention", why, 1),)
    assert graph.notes == [
        f"the KV cache stays in float32, not int8: ONNX Runtime reads the cache of {layers}, "
        f"attention stays outside of kernels: {why}"
    ]
