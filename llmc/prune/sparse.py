"""Compute 2:4 sparsity: two of every four neighbouring inputs of each output are 0.

With repair, masks and weights are computed as in SparseGPT (Frantar & Alistarh 2023): inputs are processed
one after the other, the error of the products that removing a weight causes is spread over the remaining
inputs by the Cholesky factor of the inverse of the Hessian H = sum(x x'), and those two of four are removed
that cause the least error. Without repair, the two with the smallest products are removed (Wanda, Sun et al.
2023), and no weight is changed.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from llmc.arrays import Array
from llmc.calibration.hessian import damp, factorize
from llmc.errors import UnsupportedError
from llmc.threads import spread

#: Number of neighbours along the inputs, and how many of them become 0.
GROUP, PRUNED = 4, 2
#: Number of inputs whose updates are applied to the later ones together.
_LAZY = 128
#: Number of outputs per task.
_OUTPUTS = 512


def sparsify(weights: Array, hessian: Array, name: str, *, repair: bool) -> Array:
    """Return a matrix (N, K) with 2:4 sparsity along K, float32.

    Args:
        hessian: sum of x x' over tokens, (K, K).
        name: Name of the matrix in errors.

    Raises:
        UnsupportedError: K is not a multiple of 4.
        CheckpointError: An activation is not finite.
        ConfigError: The Hessian cannot be factorized.
    """
    outputs, inputs = weights.shape
    if inputs % GROUP:
        raise UnsupportedError(
            f"2:4 sparsity needs a multiple of 4 inputs, and {name} has {inputs}",
            hint="leave sparsity out of the target",
        )
    sparse = weights.astype(np.float32)
    if not repair:
        squares = np.square(sparse) * np.diagonal(damp(hessian, name)).astype(np.float32)
        sparse[_least(squares.T).T] = 0
        return sparse
    _, upper = factorize(hessian, name, np.arange(inputs))
    factor = np.ascontiguousarray(upper, np.float32)

    def compensate(first: int) -> None:
        here = slice(first, first + _OUTPUTS)
        sparse[here] = _compensate(np.ascontiguousarray(sparse[here].T), factor).T

    work: list[Callable[[], None]] = [partial(compensate, first) for first in range(0, outputs, _OUTPUTS)]
    spread(work)
    return sparse


def is_sparse(weights: Array) -> bool:
    """Return whether a matrix (N, K) has at most two nonzero weights in every four neighbouring inputs."""
    groups = weights.reshape(-1, GROUP) if weights.shape[1] % GROUP == 0 else None
    return groups is not None and bool(((groups != 0).sum(1) <= GROUP - PRUNED).all())


def _least(scores: Array) -> Array:
    """Return a mask of the least two of four along the first axis of (K, n); the first of equal ones."""
    groups = scores.reshape(-1, GROUP, scores.shape[1])
    places = np.argsort(groups, axis=1, kind="stable")[:, :PRUNED]
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, places, True, axis=1)
    return mask.reshape(scores.shape)


def _compensate(weights: Array, upper: Array) -> Array:
    """Make weights (K, n) sparse in place, and return them."""
    count = len(weights)
    diagonal = np.diagonal(upper)[:, None]
    removed = np.zeros((GROUP, weights.shape[1]), bool)
    for first in range(0, count, _LAZY):
        last = min(first + _LAZY, count)
        left = np.empty((last - first, weights.shape[1]), np.float32)
        for row in range(first, last):
            if row % GROUP == 0:
                fours = slice(row, row + GROUP)
                removed = _least(np.square(weights[fours] / diagonal[fours]))
            error = np.where(removed[row % GROUP], weights[row], 0) / upper[row, row]
            weights[row][removed[row % GROUP]] = 0
            left[row - first] = error
            if row + 1 < last:
                weights[row + 1 : last] -= upper[row, row + 1 : last, None] * error
        if last < count:
            weights[last:] -= upper[first:last, last:].T @ left
    return weights
