"""Block quantization again, one block at a time in float64: slow, plain, and the judge of the fast one."""

import numpy as np

from llmc.config import WeightScheme

Array = np.ndarray


def scheme(bits: int = 4, block_size: int = 32, symmetric: bool = True, method: str = "rtn") -> WeightScheme:
    return WeightScheme.model_validate(
        {"bits": bits, "block_size": block_size, "symmetric": symmetric, "method": method}
    )


def cut(weights: Array, block_size: int) -> Array:
    """(N, K) to float64 (N, blocks, block_size), padded with zeros."""
    rows, width = weights.shape
    blocks = -(-width // block_size)
    padded = np.zeros((rows, blocks * block_size))
    padded[:, :width] = weights
    return padded.reshape(rows, blocks, block_size)


def nearest(block: Array, scale: float, zero: int, bits: int) -> Array:
    """Weights as they are read back, with the nearest code each."""
    if scale == 0:
        return np.zeros_like(block)
    codes = np.clip(np.rint(block / scale) + zero, 0, 2**bits - 1)
    return (codes - zero) * scale


def round_to_nearest(block: Array, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point that span a block."""
    if symmetric:
        largest = block[np.argmax(np.abs(block))]
        return -largest / 2 ** (bits - 1), 2 ** (bits - 1)
    low, high = min(block.min(), 0.0), max(block.max(), 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, 0 if scale == 0 else round(-low / scale)


def best_error(block: Array, bits: int, symmetric: bool, grid: int = 120) -> float:
    """Least squared error over a fine grid of scales, and over every zero point if asymmetric."""
    scale, _ = round_to_nearest(block, bits, symmetric)
    zeros = [2 ** (bits - 1)] if symmetric else range(2**bits)
    tried = scale * np.linspace(0.7, 1.4, grid)
    return min(float(((block - nearest(block, s, z, bits)) ** 2).sum()) for s in tried for z in zeros)
