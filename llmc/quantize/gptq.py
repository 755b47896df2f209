"""GPTQ: codes that make up for each other's error on real activations (Frantar et al. 2023).

Of a linear layer with inputs x and Hessian H = sum(x x'), input features are rounded one by one in the order of
falling diagonal of H (activation order), and what is left of each is spread over those still to come by the
Cholesky factor of the inverse of H. Scales and zero points of the blocks are searched before the first feature
is rounded, on the weights as they are (static groups), so that features need not be stored in that order.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from llmc.config import WeightScheme
from llmc.errors import CheckpointError, ConfigError
from llmc.graph.weights import Array
from llmc.quantize.blocks import PackedBlocks, ScaleType, pack, unpack, zero_level
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.stream import spread

#: Added to the diagonal of H, as a part of its mean (the paper's).
DAMPING = 0.01
#: Input features whose updates are spread over the later ones at a time (the paper's B).
_LAZY = 128
#: Outputs that one task works on: their part of a lazy block stays in the cache.
_OUTPUTS = 512


def factorize(hessian: Array, name: str) -> tuple[Array, Array]:
    """The order of input features, and the upper Cholesky factor of the inverse of H in that order.

    Args:
        hessian: sum of x x' over tokens, (K, K).
        name: What errors call the matrix.

    Raises:
        CheckpointError: An activation is not finite.
        ConfigError: H cannot be factorized.
    """
    if not np.isfinite(hessian).all():
        raise CheckpointError(
            f"the activations that {name} is given on the calibration text are not all finite",
            hint="the checkpoint is damaged, or needs a target without calibration",
        )
    matrix = hessian.astype(np.float64)
    diagonal = np.diagonal(matrix).copy()
    idle = diagonal <= 0
    order = np.argsort(-diagonal, kind="stable")
    damping = DAMPING * float(diagonal.mean())
    matrix[np.diag_indices_from(matrix)] += damping + np.where(idle, 1.0, 0.0)
    matrix = matrix[np.ix_(order, order)]
    try:
        lower = np.linalg.inv(np.linalg.cholesky(matrix))
        return order, np.linalg.cholesky(lower.T @ lower).T
    except np.linalg.LinAlgError as error:
        raise ConfigError(
            f"the calibration text does not determine {name}: its Hessian of {len(matrix)} features is singular",
            hint="use a longer calibration text",
        ) from error


def quantize_gptq(
    weights: Array, hessian: Array, scheme: WeightScheme, scale_type: ScaleType, name: str
) -> PackedBlocks:
    """Quantize a matrix (N, K) by the Hessian (K, K) of its inputs.

    Raises:
        CheckpointError: A weight, scale or activation is not finite.
        ConfigError: The Hessian cannot be factorized.
    """
    order, upper = factorize(hessian, name)
    start = quantize_blocks(weights, scheme.model_copy(update={"method": "mse"}), scale_type, name)
    outputs, blocks = start.scales.shape
    codes = unpack(start.codes, scheme.bits, scheme.block_size).reshape(outputs, -1).copy()
    scales = start.scales.astype(np.float32)
    if start.zero_points is None:
        zeros = np.full_like(scales, zero_level(scheme))
    else:
        zeros = unpack(start.zero_points, scheme.bits, blocks).astype(np.float32)
    factor = upper.astype(np.float32)
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

    work: list[Callable[[], None]] = [partial(compensate, first) for first in range(0, outputs, _OUTPUTS)]
    spread(work)
    packed = pack(codes.reshape(outputs, blocks, scheme.block_size), scheme.bits)
    return PackedBlocks(packed, start.scales, start.zero_points, start.in_features, scheme)


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
