"""GPTQ: codes that make up for each other's error on real activations (Frantar et al. 2023).

Of a linear layer with inputs x and Hessian H = sum(x x'), input features are rounded one by one in the
order of falling diagonal of H (activation order), and what is left of each is spread over those still to
come by the Cholesky factor of the inverse of H. Scales and zero points of the blocks are searched before
the first feature is rounded, on the weights as they are (static groups), so that features need not be
stored in that order; errors count there by the mean square of their feature. Once the codes stand, the
scales of a row are those that leave the least error (w - s q) H (w - s q)' in all: a system of as many
equations as the row has blocks.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from llmc.arrays import Array
from llmc.calibration.hessian import factorize, weigh_features
from llmc.config import WeightScheme
from llmc.config.method import Gptq
from llmc.quantize.blocks import PackedBlocks, ScaleType, pack, unpack, zero_level
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.methods import CalibratedHandler
from llmc.threads import spread

#: Input features whose updates are spread over the later ones at a time (the paper's B).
_LAZY = 128
#: Outputs that one task works on: their part of a lazy block stays in the cache.
_OUTPUTS = 512


def quantize_gptq(
    weights: Array, hessian: Array, scheme: WeightScheme, scale_type: ScaleType, name: str
) -> PackedBlocks:
    """Quantize a matrix (N, K) by the Hessian (K, K) of its inputs.

    Raises:
        CheckpointError: A weight, scale or activation is not finite.
        ConfigError: The Hessian cannot be factorized.
    """
    order, upper, damped = factorize(hessian, name)
    start = quantize_blocks(weights, scheme, scale_type, name, weigh_features(np.diagonal(hessian)))
    outputs, blocks = start.scales.shape
    codes = unpack(start.codes, scheme.bits, scheme.block_size).reshape(outputs, -1).copy()
    scales = start.scales.astype(np.float32)
    if start.zero_points is None:
        zeros = np.full_like(scales, zero_level(scheme))
    else:
        zeros = unpack(start.zero_points, scheme.bits, blocks).astype(np.float32)
    stored = start.scales.copy()
    damped = damped.astype(np.float32)
    factor = np.ascontiguousarray(upper, np.float32)
    owner = order // scheme.block_size

    def compensate(first: int) -> None:
        here = slice(first, min(first + _OUTPUTS, outputs))
        found = _compensate(
            np.ascontiguousarray(weights[here].astype(np.float32).T[order]),
            np.ascontiguousarray(scales[here].T)[owner],
            np.ascontiguousarray(zeros[here].T)[owner],
            factor,
            2**scheme.bits - 1,
        )
        codes[here, order] = found.T
        levels = codes[here].reshape(-1, blocks, scheme.block_size) - zeros[here][:, :, None]
        refit = _refit(weights[here].astype(np.float32), levels, scales[here], damped)
        stored[here] = refit.astype(scale_type)

    work: list[Callable[[], None]] = [partial(compensate, first) for first in range(0, outputs, _OUTPUTS)]
    spread(work)
    packed = pack(codes.reshape(outputs, blocks, scheme.block_size), scheme.bits)
    return PackedBlocks(packed, stored, start.zero_points, start.in_features, scheme)


def _compensate(weights: Array, scales: Array, zeros: Array, upper: Array, highest: int) -> Array:
    """Codes uint8 (K, n) of weights (K, n), which are overwritten; scales and zero points likewise (K, n)."""
    count = len(weights)
    codes = np.empty(weights.shape, np.uint8)
    for first in range(0, count, _LAZY):
        last = min(first + _LAZY, count)
        left = np.empty((last - first, weights.shape[1]), np.float32)
        for row in range(first, last):
            scale, zero = scales[row], zeros[row]
            inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
            code = np.clip(np.rint(weights[row] * inverse) + zero, 0, highest)
            codes[row] = code
            error = (weights[row] - (code - zero) * scale) / upper[row, row]
            left[row - first] = error
            if row + 1 < last:
                weights[row + 1 : last] -= upper[row, row + 1 : last, None] * error
        if last < count:
            weights[last:] -= upper[first:last, last:].T @ left
    return codes


def _refit(weights: Array, levels: Array, scales: Array, hessian: Array) -> Array:
    """The scales (n, blocks) of least error, for weights (n, K) and levels (n, blocks, block_size)."""
    outputs, blocks, size = levels.shape
    features = weights.shape[1]
    flat = levels.reshape(outputs, -1)
    system = np.zeros((outputs, blocks, blocks), np.float64)
    right = np.empty((outputs, blocks), np.float64)
    edges = np.arange(0, features, size)
    for block, start in enumerate(edges):
        part = hessian[start : start + size]
        spread_out = levels[:, block, : len(part)] @ part
        right[:, block] = np.einsum("ij,ij->i", spread_out, weights)
        spread_out *= flat[:, :features]
        system[:, block] = np.add.reduceat(spread_out, edges, axis=1)
    diagonal = np.einsum("nbb->nb", system)
    empty = diagonal <= 0
    diagonal += np.where(empty, 1.0, 1e-6 * diagonal)
    found: Array = np.linalg.solve(system, right[:, :, None])[:, :, 0]
    return np.where(empty, scales, found).astype(np.float32)


class GptqHandler(CalibratedHandler):
    """The handler of `Gptq`."""

    method = Gptq

    def calibrate(
        self, weights: Array, hessian: Array, scheme: WeightScheme, scale_type: ScaleType, name: str
    ) -> PackedBlocks:
        return quantize_gptq(weights, hessian, scheme, scale_type, name)


HANDLER = GptqHandler()
