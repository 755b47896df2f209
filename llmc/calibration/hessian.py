"""Process the Hessian H = sum(x x') of a linear layer's inputs: damp it, factorize it, derive importance."""

import numpy as np

from llmc.arrays import Array
from llmc.errors import CheckpointError, ConfigError

#: Share of the diagonal's mean that is added to the diagonal of H (as in GPTQ's paper).
DAMPING = 0.01


def factorize(hessian: Array, name: str, order: Array | None = None) -> tuple[Array, Array, Array]:
    """Return the order of input features, the upper Cholesky factor of H^-1 in that order, and H damped.

    Args:
        hessian: sum of x x' over tokens, (K, K).
        name: Name of the matrix in errors.
        order: Order of the features; None for activation order.

    Raises:
        CheckpointError: An activation is not finite.
        ConfigError: H cannot be factorized.
    """
    import torch

    matrix = damp(hessian, name)
    if order is None:
        order = np.argsort(-np.diagonal(hessian).astype(np.float64), kind="stable")
    # With H = R R' and R upper triangular, which is the Cholesky factor of H read from its far end, the
    # inverse of H is U' U with U = R^-1.
    backwards = torch.from_numpy(matrix[np.ix_(order[::-1], order[::-1])])
    lower, failed = torch.linalg.cholesky_ex(backwards)
    if int(failed):
        raise ConfigError(
            f"the calibration text does not determine {name}: its Hessian of {len(matrix)} features "
            "is singular",
            hint="use a longer calibration text",
        )
    one = torch.eye(len(matrix), dtype=torch.float64)
    inverse: Array = torch.linalg.solve_triangular(lower, one, upper=False).numpy()
    return order, inverse[::-1, ::-1], matrix


def damp(hessian: Array, name: str) -> Array:
    """Add DAMPING of the mean to the diagonal of H, and 1 where the text does not use a feature; float64.

    Raises:
        CheckpointError: An activation is not finite.
    """
    if not np.isfinite(hessian).all():
        raise CheckpointError(
            f"the inputs of {name} on the calibration text are not all finite",
            hint="the checkpoint is damaged, or needs a target without calibration",
        )
    matrix: Array = hessian.astype(np.float64)
    diagonal = np.diagonal(matrix).copy()
    damping = DAMPING * float(diagonal.mean())
    matrix[np.diag_indices_from(matrix)] += damping + np.where(diagonal <= 0, 1.0, 0.0)
    return matrix


def weigh_features(squares: Array) -> Array:
    """Return the weight of each input feature's error, float32 (K,), from the sums of its squares."""
    mean = float(squares.mean())
    if not mean > 0:
        return np.ones(len(squares), np.float32)
    # A feature that the text does not use still needs codes near its weight.
    weights: Array = (squares / mean + DAMPING).astype(np.float32)
    return weights
