"""Products and functions of rows against NumPy: shapes, extremes, both instruction sets, both paths."""

from dataclasses import dataclass
from math import erf
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.backends.compiled.isa import InstructionSet
from llmc.backends.compiled.pack import PackedLayout, pack_groups
from llmc.errors import CheckpointError
from llmc.graph.model import PackedZero
from llmc.quantize.blocks import PackedBlocks, dequantize_blocks
from tests.backends.compiled.graphs import (
    Array,
    GraphBuilder,
    open_session,
    quantize_activations,
    quantized,
    usable_sets,
    with_minima,
    write_compiled,
)

K = 80
#: Outputs, bits, block, symmetric or "minimum", largest code of an activation; 80 inputs fill no number of
#: blocks of 32 or 64.
CASES: list[tuple[int, int, int, bool | str, int]] = [
    (48, 4, 32, False, 127),
    (17, 4, 64, False, 127),
    (33, 4, 16, True, 127),
    (20, 8, 32, True, 127),
    (16, 4, 128, False, 127),
    (16, 8, 16, True, 127),
    (33, 4, 32, "minimum", 127),
    (17, 8, 32, "minimum", 127),
    (16, 4, 16, "minimum", 127),
    (17, 4, 32, False, 127 * 256),
    (33, 8, 128, True, 127 * 256),
    (16, 8, 32, "minimum", 127 * 256),
]


def half_scales(blocks: PackedBlocks) -> Array:
    """The weights with scales as kernels store them."""
    scales = blocks.scales.astype(np.float16).astype(np.float32)
    kept = PackedBlocks(blocks.codes, scales, blocks.zero_points, blocks.in_features, blocks.scheme)
    return dequantize_blocks(kept).astype(np.float64)


@dataclass
class Products:
    session: object
    weights: list[Array]

    def run(self, x: Array) -> list[Array]:
        return self.session.run(None, {"x": x.astype(np.float32)})  # type: ignore[attr-defined, no-any-return]

    def expected(self, x: Array) -> list[Array]:
        rows = [quantize_activations(x.astype(np.float32), block, most) for _, _, block, _, most in CASES]
        return [a @ w.T for a, w in zip(rows, self.weights, strict=True)]


@pytest.fixture(scope="module", params=usable_sets(), ids=lambda isa: isa.name)
def products(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Products:
    isa: InstructionSet = request.param
    rng = np.random.default_rng(0)
    builder = GraphBuilder()
    x = builder.input("x", K)
    outputs, weights = [], []
    for index, (n, bits, block, kind, most) in enumerate(CASES):
        level = 4 if most == 127 else 2
        if kind == "minimum":
            blocks, values = with_minima(n, K, bits, block, seed=index)
        else:
            blocks = quantized(rng.standard_normal((n, K)).astype(np.float32), bits, block, bool(kind))
            values = half_scales(blocks)
        weights.append(values.astype(np.float64))
        outputs.append(builder.matmul(x, blocks, f"w{index}", level=level))
    folder = tmp_path_factory.mktemp("products")
    made = write_compiled(builder.finish(outputs), folder, isa)
    assert (made.regions, made.nodes, made.outside) == (1, len(CASES), ())
    return Products(open_session(folder, threads=2), weights)


EXTREMES = {
    "zeros": np.zeros(K),
    "largest": np.full(K, 3e38),
    "outlier": np.where(np.arange(K) == 40, 1e6, 1e-3),
    "denormal": np.full(K, 1e-40),
    "alternating": np.where(np.arange(K) % 2, 1.0, -1.0),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("rows", [1, 70])
def test_extremes(products: Products, name: str, rows: int) -> None:
    scale = 1e-30 if name == "largest" else 1.0  # so that the sum is finite
    x = np.broadcast_to(EXTREMES[name] * scale, (1, rows, K))
    for found, expected in zip(products.run(x), products.expected(x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * (1 + np.abs(expected).max()))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    power=st.floats(-6, 6),
)
def test_shapes(products: Products, batch: int, sequence: int, seed: int, power: float) -> None:
    x = np.random.default_rng(seed).standard_normal((batch, sequence, K)) * 10**power
    for found, expected in zip(products.run(x), products.expected(x), strict=True):
        assert found.shape == expected.shape
        # The reference rounds a value that lies on a border now and then to the other side.
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 2e-3


@pytest.mark.parametrize("rows", [1, 7, 70])
def test_activations_of_16_bits_are_nearly_exact(products: Products, rows: int) -> None:
    x = np.random.default_rng(rows).standard_normal((1, rows, K)).astype(np.float32)
    for found, weights, (*_, most) in zip(products.run(x), products.weights, CASES, strict=True):
        exact = x @ weights.T
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert error < 5e-5 if most > 127 else 1e-3 < error < 2e-2


def test_results_do_not_depend_on_the_rows_beside(products: Products) -> None:
    x = np.random.default_rng(1).standard_normal((1, 70, K))
    whole = products.run(x)
    for row in (0, 69):
        for part, all_rows in zip(products.run(x[:, row : row + 1]), whole, strict=True):
            np.testing.assert_allclose(part[0, 0], all_rows[0, row], rtol=1e-5, atol=1e-5)


def test_no_tokens_are_an_error(products: Products) -> None:
    with pytest.raises(Exception, match="Region0: there are no tokens"):
        products.run(np.zeros((1, 0, K)))


def _norm(x: Array, scale: Array) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * scale


def test_norms_gates_and_splits(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    width, inner = 32, 48
    builder = GraphBuilder()
    x = builder.input("x", width)
    scale, bias = (rng.standard_normal(width).astype(np.float32) for _ in range(2))
    up, down = (
        quantized(rng.standard_normal(s).astype(np.float32), 8, 32, True)
        for s in ((2 * inner, width), (width, inner))
    )
    (scale_value,) = builder.weight("scale", {"value": scale})
    (bias_value,) = builder.weight("bias", {"value": bias})
    normed = builder.node(
        "SimplifiedLayerNormalization", [x, scale_value], "normed", width, axis=-1, epsilon=1e-5
    )
    both = builder.matmul(normed, up, "up")
    sizes = builder.value("sizes", [2], ir.DataType.INT64)
    sizes.const_value = ir.tensor(np.array([inner, inner], np.int64), name="sizes")
    builder.weights.append(sizes)
    gate, linear = (builder.value(n, ["batch", "sequence", inner]) for n in ("gate", "linear"))
    builder.nodes.append(ir.node("Split", [both, sizes], {"axis": -1}, outputs=[gate, linear], name="split"))
    silu = builder.node("QuickGelu", [gate], "silu", inner, "com.microsoft", alpha=1.0)
    product = builder.node("Mul", [silu, linear], "product", inner)
    out = builder.matmul(product, down, "down")
    biased = builder.node("Add", [out, bias_value], "biased", width)
    gelu = builder.node("Gelu", [biased], "gelu", width)
    total = builder.node("Add", [gelu, x], "total", width)
    write_compiled(builder.finish([total]), tmp_path, usable_sets()[0])
    data = rng.standard_normal((2, 11, width)).astype(np.float32)
    (found,) = open_session(tmp_path).run(None, {"x": data})
    h = quantize_activations(_norm(data, scale), 32) @ half_scales(up).T
    h = h[..., :inner] / (1 + np.exp(-h[..., :inner])) * h[..., inner:]
    y = quantize_activations(h.astype(np.float32), 32) @ half_scales(down).T + bias
    expected = y * 0.5 * (1 + np.vectorize(erf)(y / np.sqrt(2))) + data
    assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 5).map(lambda i: 16 * i),
    block=st.sampled_from([16, 32, 64]),
    kind=st.sampled_from([(4, True), (4, False), (8, True)]),
    seed=st.integers(0, 1000),
)
def test_packing_keeps_every_code(n: int, k: int, block: int, kind: tuple[int, bool], seed: int) -> None:
    bits, symmetric = kind
    blocks = quantized(
        np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32), bits, block, symmetric
    )
    layout = PackedLayout(n, k, bits, block, PackedZero.MIDDLE if symmetric else PackedZero.CODE)
    members = {"codes": blocks.codes, "scales": blocks.scales, "zero_points": blocks.zero_points}
    packed = pack_groups(members, layout)  # type: ignore[arg-type]
    assert packed.shape == (layout.groups, layout.group_bytes)
    read_back = np.zeros((layout.groups * 16, layout.blocks * block))
    for output, row in enumerate(read_back):
        group, lane = packed[output // 16], output % 16
        for b in range(layout.blocks):
            scale = group[layout.scales_at :].view(np.float16)[b * 16 + lane].astype(np.float64)
            zero = 1 << (bits - 1)
            if not symmetric:
                zero = int(group[layout.zeros_at + b * 8 + lane // 2]) >> (lane % 2 * 4) & 15
            for i in range(block):
                at = b * block * 16 * bits // 8 + (i // 4 if bits == 8 else i // 8) * 64 + lane * 4 + i % 4
                code = int(group[at])
                if bits == 4:
                    code = code >> (i // 4 % 2 * 4) & 15
                row[b * block + i] = (code - zero) * scale
    np.testing.assert_array_equal(read_back[:n, :k], half_scales(blocks))


@pytest.mark.parametrize(("scale", "found"), [(1e6, r"scale of 1e\+06"), (1e3, r"minimum of 1e\+06")])
def test_a_number_beyond_float16_is_an_error(scale: float, found: str) -> None:
    layout = PackedLayout(16, 16, 4, 16, PackedZero.MINIMUM)
    members = {"codes": np.zeros((16, 1, 8), np.uint8), "scales": np.full((16, 1), scale, np.float32)}
    members["zero_points"] = np.full((16, 1), 1e3, np.float32)
    with pytest.raises(CheckpointError, match=f"a {found} is too large for float16"):
        pack_groups(members, layout)


def test_relu_is_part_of_a_region(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    builder = GraphBuilder()
    x = builder.input("x", 32)
    blocks = quantized(rng.standard_normal((48, 32)).astype(np.float32), 8, 32, True)
    made = write_compiled(
        builder.finish([builder.node("Relu", [builder.matmul(x, blocks, "up")], "y", 48)]),
        tmp_path,
        usable_sets()[0],
    )
    assert (made.regions, made.nodes) == (1, 2)
    data = rng.standard_normal((2, 3, 32)).astype(np.float32)
    (found,) = open_session(tmp_path).run(None, {"x": data})
    expected = np.maximum(quantize_activations(data, 32) @ half_scales(blocks).T, 0)
    assert 0 < np.count_nonzero(found) < found.size
    np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())
