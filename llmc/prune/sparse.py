"""2:4 sparsity: two of every four neighbouring inputs of each output are 0.

With repair, masks and weights are those of SparseGPT (Frantar & Alistarh 2023): inputs are taken one after
the other, what a weight that goes to 0 leaves of the products is spread over the inputs still to come by the
Cholesky factor of the inverse of the Hessian H = sum(x x'), and the two of four go that leave least. Without,
the two go whose products are smallest (Wanda, Sun et al. 2023), and no weight is changed.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from llmc.arrays import Array
from llmc.calibration.hessian import damp, factorize
from llmc.errors import UnsupportedError
from llmc.threads import spread

#: Neighbours along the inputs, and how many of them go to 0.
GROUP, PRUNED = 4, 2
#: Inputs whose updates are spread over the later ones at a time.
_LAZY = 128
#: Outputs that one task works on.
_OUTPUTS = 512


def sparsify(weights: Array, hessian: Array, name: str, *, repair: bool) -> Array:
    """A matrix (N, K) with 2:4 sparsity along K, float32.

    Args:
        hessian: sum of x x' over tokens, (K, K).
        name: What errors call the matrix.

    Raises:
        UnsupportedError: K is no multiple of 4.
        CheckpointError: An activation is not finite.
        ConfigError: The Hessian cannot be factorized.
    """
    outputs, inputs = weights.shape
    if inputs % GROUP:
        raise UnsupportedError(
            f"2:4 sparsity needs inputs in fours, and {name} has {inputs}",
            hint="leave sparsity out of the target",
        )
    kept = weights.astype(np.float32)
    if not repair:
        squares = np.square(kept) * np.diagonal(damp(hessian, name)).astype(np.float32)
        kept[_least(squares.T).T] = 0
        return kept
    _, upper, _ = factorize(hessian, name, np.arange(inputs))
    factor = np.ascontiguousarray(upper, np.float32)

    def compensate(first: int) -> None:
        here = slice(first, first + _OUTPUTS)
        kept[here] = _compensate(np.ascontiguousarray(kept[here].T), factor).T

    work: list[Callable[[], None]] = [partial(compensate, first) for first in range(0, outputs, _OUTPUTS)]
    spread(work)
    return kept


def is_sparse(weights: Array) -> bool:
    """Whether a matrix (N, K) has no more than two weights in every four neighbouring inputs."""
    groups = weights.reshape(-1, GROUP) if weights.shape[1] % GROUP == 0 else None
    return groups is not None and bool(((groups != 0).sum(1) <= GROUP - PRUNED).all())


def _least(scores: Array) -> Array:
    """Where the least two of four are, along the first axis of (K, n); the first of equal ones."""
    groups = scores.reshape(-1, GROUP, scores.shape[1])
    places = np.argsort(groups, axis=1, kind="stable")[:, :PRUNED]
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, places, True, axis=1)
    return mask.reshape(scores.shape)


def _compensate(weights: Array, upper: Array) -> Array:
    """Weights (K, n), made sparse in place."""
    count = len(weights)
    diagonal = np.diagonal(upper)[:, None]
    gone = np.zeros((GROUP, weights.shape[1]), bool)
    for first in range(0, count, _LAZY):
        last = min(first + _LAZY, count)
        left = np.empty((last - first, weights.shape[1]), np.float32)
        for row in range(first, last):
            if row % GROUP == 0:
                fours = slice(row, row + GROUP)
                gone = _least(np.square(weights[fours] / diagonal[fours]))
            error = np.where(gone[row % GROUP], weights[row], 0) / upper[row, row]
            weights[row][gone[row % GROUP]] = 0
            left[row - first] = error
            if row + 1 < last:
                weights[row + 1 : last] -= upper[row, row + 1 : last, None] * error
        if last < count:
            weights[last:] -= upper[first:last, last:].T @ left
    return weights
