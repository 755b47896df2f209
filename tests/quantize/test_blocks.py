import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llmc.config import WeightScheme
from llmc.errors import CheckpointError
from llmc.quantize.blocks import PackedBlocks, dequantize_blocks, pack, unpack
from llmc.quantize.encode import Encoder, quantize_blocks
from tests.quantize import reference
from tests.quantize.reference import Array, cut, scheme

BITS, SIZES = (4, 8), (16, 32, 64, 128)


def normal(rows: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def snr(weights: Array, blocks: PackedBlocks) -> float:
    error = dequantize_blocks(blocks) - weights
    return float(10 * np.log10((weights**2).sum() / (error**2).sum()))


def errors_by_block(weights: Array, blocks: PackedBlocks) -> Array:
    size = blocks.scheme.block_size
    read_back = cut(dequantize_blocks(blocks), size)
    original = cut(weights, size)
    result: Array = ((original - read_back) ** 2).sum(axis=-1)
    return result


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_equals_the_plain_reference(bits: int, size: int, symmetric: bool) -> None:
    weights = normal(5, 3 * size - 7)
    blocks = quantize_blocks(weights, scheme(bits, size, symmetric, "rtn"))
    expected = np.empty_like(cut(weights, size))
    for at in np.ndindex(expected.shape[:2]):
        block = cut(weights, size)[at]
        expected[at] = reference.nearest(block, *reference.round_to_nearest(block, bits, symmetric), bits)
    expected = expected.reshape(5, -1)[:, : weights.shape[1]]
    step = np.abs(weights).max() / 2 ** (bits - 1)
    off = np.abs(dequantize_blocks(blocks) - expected)
    assert (off > 1e-5).mean() < 0.002  # float32 may round a tie the other way
    assert off.max() <= 2.1 * step


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_comes_close_to_an_exhaustive_search(size: int, symmetric: bool) -> None:
    weights = np.random.default_rng(1).standard_t(5, size=(10, size)).astype(np.float32)
    fast = errors_by_block(weights, quantize_blocks(weights, scheme(4, size, symmetric, "mse")))
    plain = errors_by_block(weights, quantize_blocks(weights, scheme(4, size, symmetric, "rtn")))
    least = [reference.best_error(b, 4, symmetric) for b in cut(weights, size).reshape(-1, size)]
    assert fast.sum() <= 1.04 * np.sum(least)
    assert fast.sum() <= 0.93 * plain.sum()


FLOORS = {
    (4, True, "rtn"): (22.3, 21.2, 20.4, 19.6),
    (4, True, "mse"): (23.0, 21.7, 20.8, 20.2),
    (4, False, "rtn"): (23.0, 21.7, 20.7, 19.8),
    (4, False, "mse"): (23.8, 22.2, 21.1, 20.3),
    (8, True, "rtn"): (46.5, 45.4, 44.5, 43.7),
    (8, True, "mse"): (47.6, 46.1, 45.0, 44.1),
    (8, False, "rtn"): (47.6, 46.3, 45.3, 44.4),
    (8, False, "mse"): (48.7, 47.0, 45.7, 44.7),
}


@pytest.mark.parametrize(("key", "floors"), FLOORS.items(), ids=str)
@pytest.mark.parametrize("scale_type", [np.float32, np.float16])
def test_signal_to_noise_on_normal_weights(
    key: tuple[int, bool, str], floors: tuple[float, ...], scale_type: type[np.float32] | type[np.float16]
) -> None:
    weights = normal(256, 512)
    bits, symmetric, method = key
    for size, floor in zip(SIZES, floors, strict=True):
        found = snr(weights, quantize_blocks(weights, scheme(bits, size, symmetric, method), scale_type))
        assert found >= floor, size


VALUES = st.one_of(
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, 0.5, -0.5, 1e-45, -3e-39, 1e-30, 1000.0]),
)
MATRICES = st.tuples(st.integers(1, 3), st.integers(1, 70)).flatmap(
    lambda shape: arrays.arrays(np.float32, shape, elements=VALUES, fill=st.just(0.25))
)


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.sampled_from(BITS), st.sampled_from((16, 32)), st.booleans(), st.booleans())
def test_any_weights_are_finite_and_no_worse_than_rtn(
    weights: Array, bits: int, size: int, symmetric: bool, half: bool
) -> None:
    scale_type = np.float16 if half else np.float32
    plain = quantize_blocks(weights, scheme(bits, size, symmetric, "rtn"), scale_type)
    searched = quantize_blocks(weights, scheme(bits, size, symmetric, "mse"), scale_type)
    for blocks in (plain, searched):
        assert np.isfinite(dequantize_blocks(blocks)).all()
        assert blocks.codes.dtype == np.uint8
        assert blocks.scales.dtype == scale_type
        limit = 1.01 * np.abs(cut(weights, size)).max(axis=-1, keepdims=True) + 2.0**-16
        assert (np.abs(cut(dequantize_blocks(blocks) - weights, size)) <= limit).all()
    bound = errors_by_block(weights, plain)
    assert (errors_by_block(weights, searched) <= bound * 1.0001 + 1e-9 * np.abs(weights).max() ** 2).all()


@pytest.mark.parametrize(
    ("bits", "symmetric", "method"), list(itertools.product(BITS, (True, False), ("rtn", "mse")))
)
def test_corner_blocks(bits: int, symmetric: bool, method: str) -> None:
    outlier = np.full(32, 0.01, np.float32)
    outlier[7] = -5000.0
    rows = {
        "zeros": np.zeros(32, np.float32),
        "constant": np.full(32, 0.37, np.float32),
        "negative": -np.linspace(0.1, 0.9, 32, dtype=np.float32),
        "outlier": outlier,
        "denormal": np.full(32, 1e-40, np.float32),
    }
    weights = np.stack(list(rows.values()))
    blocks = quantize_blocks(weights, scheme(bits, 32, symmetric, method))
    back = dict(zip(rows, dequantize_blocks(blocks), strict=True))
    assert (back["zeros"] == 0).all()
    assert back["constant"] == pytest.approx(rows["constant"], rel=1e-5)
    assert np.abs(back["negative"] - rows["negative"]).max() <= 0.9 / 2 ** (bits - 1)
    assert back["outlier"][7] == pytest.approx(-5000.0, rel=1e-4)
    assert (back["denormal"] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_a_value_that_is_not_finite_is_named(bad: float, symmetric: bool, method: str) -> None:
    weights = normal(4, 64)
    weights[2, 40] = bad
    with pytest.raises(CheckpointError, match=r"w\.proj has values in outputs 0:4 that are not finite"):
        quantize_blocks(weights, scheme(4, 32, symmetric, method), name="w.proj")


def test_a_scale_too_large_for_float16_is_refused() -> None:
    with pytest.raises(CheckpointError, match="too large for scales of type float16"):
        quantize_blocks(np.full((1, 32), 1e7, np.float32), scheme(), np.float16)


@pytest.mark.parametrize(("bits", "size", "symmetric"), [(4, 32, True), (4, 128, False), (8, 64, True)])
def test_scales_are_searched_for_the_errors_that_count(bits: int, size: int, symmetric: bool) -> None:
    weights, kind = normal(40, 200), scheme(bits, size, symmetric, "mse")
    important = np.exp(2 * np.random.default_rng(5).standard_normal(200)).astype(np.float32)

    def error(importance: np.ndarray | None) -> float:
        read_back = dequantize_blocks(quantize_blocks(weights, kind, importance=importance))
        return float((np.square(read_back - weights, dtype=np.float64) * important).sum())

    assert error(important) < 0.95 * error(None)
    alike = quantize_blocks(weights, kind, importance=np.full(200, 4.0, np.float32))
    # Sums in another order decide between starts that are as good.
    assert np.isclose(alike.scales, quantize_blocks(weights, kind).scales, rtol=1e-5).mean() > 0.9


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 6, 7])
def test_packing_has_the_low_bits_first(bits: int, count: int) -> None:
    codes = np.random.default_rng(3).integers(0, 2**bits, (2, 3, count), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == -(-count * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)
    if bits == 4 and count > 1:
        assert packed[0, 0, 0] == codes[0, 0, 0] + 16 * codes[0, 0, 1]


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_first_gives_the_same_codes(size: int, symmetric: bool) -> None:
    important = np.linspace(0.1, 3, 200, dtype=np.float32)
    require_same_codes(normal(37, 200), scheme(4, size, symmetric, "mse"), important)


@pytest.mark.parametrize("kind", [np.float64, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_in_several_columns_have_the_same_codes(kind: type, bits: int, symmetric: bool) -> None:
    for width in (200, 256):
        weights = normal(37, width).astype(kind)
        weights[3] = 0
        require_same_codes(weights, scheme(bits, 64, symmetric, "rtn"))


def require_same_codes(weights: Array, kind: WeightScheme, important: Array | None = None) -> None:
    """The codes of whole rows are those of one block of inputs after the other."""
    expected = quantize_blocks(weights, kind, importance=important)
    encoder = Encoder("w", *weights.shape, kind, np.float32, important)
    size = kind.block_size
    for block in range(-(-weights.shape[1] // size)):
        encoder.encode_inputs(block, weights.T[block * size : (block + 1) * size])
    found = encoder.finish()
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)
    if not kind.symmetric:
        np.testing.assert_array_equal(found.zero_points, expected.zero_points)
