"""Codes and scales of the types of engines, against their definitions."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from llmc.config import WeightFormat
from llmc.quantize.formats import ActivationScale, encode, served_whole_scale, tensor_scale, whole_scale

HALF = ir.DataType.FLOAT16
WEIGHTS = np.random.default_rng(0).normal(size=(48, 128)).astype(np.float32)


def _values(weights: np.ndarray, kind: WeightFormat, block: int) -> np.ndarray:
    """What the codes stand for."""
    whole = whole_scale(float(np.abs(weights).max()), HALF) if kind is WeightFormat.NVFP4 else None
    codes, scales = encode(weights, kind, block, HALF, whole)
    assert (scales.astype(np.float32) > 0).all()
    unit = 1 if whole is None else np.float32(whole)
    values: np.ndarray = codes.astype(np.float32) * np.repeat(scales.astype(np.float32) * unit, block, axis=1)
    return values


@pytest.mark.parametrize(
    ("kind", "block", "least_db"),
    [
        (WeightFormat.INT4, 32, 19.5),
        (WeightFormat.INT8, 128, 40),
        (WeightFormat.FP8, 128, 31),
        (WeightFormat.NVFP4, 16, 20.5),
    ],
)
def test_noise(kind: WeightFormat, block: int, least_db: float) -> None:
    values = _values(WEIGHTS, kind, block)
    assert 10 * np.log10(np.square(WEIGHTS).sum() / np.square(WEIGHTS - values).sum()) > least_db


def test_ranges_of_codes_and_types_of_scales() -> None:
    codes, scales = encode(WEIGHTS, WeightFormat.INT4, 32, HALF)
    assert (codes.shape, codes.dtype, scales.shape, scales.dtype) == (
        (48, 128),
        ml_dtypes.int4,
        (48, 4),
        np.float16,
    )
    codes, scales = encode(WEIGHTS, WeightFormat.INT8, 128, HALF)
    assert np.abs(codes.astype(np.int32)).max() == 127
    codes, scales = encode(WEIGHTS, WeightFormat.NVFP4, 16, HALF, whole_scale(4.0, HALF))
    assert (codes.dtype, scales.dtype, scales.shape) == (
        ml_dtypes.float4_e2m1fn,
        ml_dtypes.float8_e4m3fn,
        (48, 8),
    )


@pytest.mark.parametrize("kind", list(WeightFormat))
def test_a_block_of_zeros_has_codes_of_zero(kind: WeightFormat) -> None:
    weights = np.zeros((2, 32), np.float32)
    weights[1] = 1
    assert not _values(weights, kind, 16)[0].any()
    np.testing.assert_allclose(_values(weights, kind, 16)[1], 1, rtol=0.01)


@pytest.mark.parametrize(("kind", "block"), [(WeightFormat.FP8, 32), (WeightFormat.NVFP4, 16)])
def test_the_largest_weight_stays_finite(kind: WeightFormat, block: int) -> None:
    """Scales are rounded to what is stored, so that a code can come out beyond the largest there is."""
    weights = np.random.default_rng(1).uniform(0.9, 1.0, (64, 32)).astype(np.float32) * 0.0123
    values = _values(weights, kind, block)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values.max(axis=1), weights.max(axis=1), rtol=0.2)


def test_scales_of_activations() -> None:
    assert ActivationScale(WeightFormat.INT8, 12.7).stored(HALF) == np.float16(0.1)
    assert ActivationScale(WeightFormat.FP8, 448).stored(HALF) == 1
    assert ActivationScale(WeightFormat.NVFP4, 2688).stored(HALF) == 1
    assert ActivationScale(WeightFormat.INT8, 0).stored(HALF) == 1  # nothing but zeros was seen


@pytest.mark.parametrize("peak", [1e-4, 0.37, 1.0, 2688.0, 3e4])
def test_scales_for_servers_lose_nothing_in_16_bits(peak: float) -> None:
    whole = served_whole_scale(peak)
    assert np.frexp(whole)[0] == 0.5
    assert whole / 2 < peak / 2688 <= whole
    scale = tensor_scale(peak, WeightFormat.FP8)
    assert scale == scale.astype(ml_dtypes.bfloat16)
    assert peak / 448 <= scale < peak / 448 * (1 + 1 / 128)


def test_a_matrix_of_zeros_has_a_scale_for_servers() -> None:
    assert served_whole_scale(0.0) == 1
    assert tensor_scale(0.0, WeightFormat.FP8) == 1
