"""Prune structures on calibration text: rank layers and units, and compensate for those that are removed.

A layer's importance is how much it turns the hidden states: one minus the cosine similarity between its input
and its output (block influence of ShortGPT, Men et al. 2024). A unit's importance is the error that its
removal causes in the products of the projection W that reads it, with inputs x and H = sum(x x'): tr(W_u H_uu
W_u') without refitting, and tr(W_u ((H^-1)_uu)^-1 W_u') after all other columns are refitted (block form of
the optimal brain surgeon: Hassibi & Stork 1993; ZipLM, Kurtic et al. 2023). The refit is the least-squares
solution, without training: W' = (W H_ak + d W_k) (H_kk + d I)^-1 over the kept columns k of all a, which
stays at W where the text has no information.
"""

import numpy as np

from llmc.arrays import Array
from llmc.calibration.hessian import damp
from llmc.errors import ConfigError


def unit_errors(weights: Array, hessian: Array, width: int, name: str, *, repair: bool) -> Array:
    """Return the error in the products of a matrix (N, K) from removing each unit, float64 (K / width,).

    Args:
        hessian: sum of x x' over tokens, (K, K).
        width: Number of inputs of a unit.
        repair: Whether all other inputs are refitted.

    Raises:
        CheckpointError: An activation is not finite.
        ConfigError: The Hessian cannot be inverted.
    """
    matrix = damp(hessian, name)
    if repair:
        matrix = _solve(matrix, np.eye(len(matrix)), name)
    own = weights.astype(np.float64)
    if width == 1:
        squares = np.square(own).sum(0)
        diagonal = np.diagonal(matrix)
        errors: Array = squares / diagonal if repair else squares * diagonal
        return errors
    unit_sums = []
    for start in range(0, len(matrix), width):
        here = slice(start, start + width)
        block = matrix[here, here]
        inner = np.linalg.inv(block) if repair else block
        unit_sums.append(float(np.einsum("nk,kl,nl->", own[:, here], inner, own[:, here])))
    return np.array(unit_sums)


def refit(weights: Array, hessian: Array, kept: Array, name: str) -> Array:
    """Refit columns `kept` of a matrix (N, K) to the products of all columns, float32 (N, kept).

    Raises:
        CheckpointError: An activation is not finite.
        ConfigError: The Hessian cannot be inverted.
    """
    damped = damp(hessian, name)
    # d on the diagonal of both sides draws the solution to the original weights.
    products = damped[np.ix_(kept, np.arange(len(damped)))] @ weights.T.astype(np.float64)
    solved: Array = _solve(damped[np.ix_(kept, kept)], products, name)
    return solved.T.astype(np.float32)


def _solve(matrix: Array, right: Array, name: str) -> Array:
    import torch

    lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    if int(failed):
        raise ConfigError(
            f"the calibration text does not determine {name}: its Hessian of {len(matrix)} features "
            "is singular",
            hint="use a longer calibration text",
        )
    solved: Array = torch.cholesky_solve(torch.from_numpy(right), lower).numpy()
    return solved
