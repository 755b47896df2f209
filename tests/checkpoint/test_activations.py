"""Activations are rounded to the numbers that ModelOpt's formats have."""

import ml_dtypes
import numpy as np
import torch

from llmc.checkpoint import activations
from llmc.checkpoint.activations import _round_blocks, _round_tokens, _round_whole

#: Rows of sizes that differ a hundredfold, (rows, inputs).
VALUES = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 4)[:, None]


def _fp8(values: np.ndarray) -> np.ndarray:
    return values.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def test_nearest_numbers_are_those_of_the_types() -> None:
    small, wide = torch.linspace(-7, 7, 4001), torch.linspace(-500, 500, 4001)
    nearest = small.numpy().clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(activations._fp4(small).numpy(), nearest)
    np.testing.assert_array_equal(activations._fp8(wide).numpy(), _fp8(wide.numpy()))


def test_fp8_has_one_scale_for_all_or_one_by_token() -> None:
    values = VALUES.numpy()
    np.testing.assert_array_equal(_round_whole(VALUES, 0.25).numpy(), _fp8(values / 0.25) * 0.25)
    scales = np.abs(values).max(-1, keepdims=True) / np.float32(448)
    np.testing.assert_allclose(_round_tokens(VALUES).numpy(), _fp8(values / scales) * scales, rtol=1e-6)


def test_nvfp4_has_a_scale_by_block_within_one_for_all() -> None:
    whole = np.float32(float(VALUES.abs().max()) / (6 * 448))
    blocks = VALUES.numpy().reshape(4, 4, 16)
    scales = _fp8(np.abs(blocks).max(-1, keepdims=True) / 6 / whole) * whole
    codes = (blocks / scales).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    rounded = _round_blocks(VALUES, float(whole)).numpy()
    np.testing.assert_allclose(rounded, (codes * scales).reshape(4, 64), rtol=1e-5)


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(1, 2, 32)
    for rounded in (_round_tokens(zeros), _round_blocks(zeros, 0.01), _round_whole(zeros, 0.01)):
        np.testing.assert_array_equal(rounded.numpy(), 0)
