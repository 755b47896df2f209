"""Process the Hessian H = sum(x x') of a linear layer's inputs: damp it, factorize it, derive importance."""

from functools import cached_property

import numpy as np

from llmc.arrays import Array
from llmc.errors import CheckpointError, ConfigError

#: Share of the diagonal's mean that is added to the diagonal of H (as in GPTQ's paper).
DAMPING = 0.01


class InputHessian:
    """The Hessian of an input, factorized once for all matrices that read it.

    Args:
        matrix: sum of x x' over tokens, (K, K).
        name: Name of a matrix that reads the input, in errors.
    """

    def __init__(self, matrix: Array, name: str) -> None:
        self.matrix = matrix
        self._name = name

    @cached_property
    def factor(self) -> tuple[Array, Array]:
        """The activation order of the features, and the transpose of `factorize`'s factor, float32 (K, K)."""
        order, upper = factorize(self.matrix, self._name)
        return order, np.ascontiguousarray(upper.T, np.float32)

    @cached_property
    def damped(self) -> Array:
        """H as `damp` returns it, float32 (K, K)."""
        return damp(self.matrix, self._name, np.float32)

    @cached_property
    def sorted(self) -> Array:
        """`damped` in the order of `factor`, float32 (K, K)."""
        order = self.factor[0]
        return np.ascontiguousarray(self.damped[np.ix_(order, order)])


def sum_of_squares(inputs: Array) -> Array:
    """Return x'x of inputs (tokens, K), (K, K) in their type."""
    # NumPy recognizes the product of a matrix with its own transpose, and computes half of it (syrk).
    product: Array = inputs.T @ inputs
    return product


def factorize(hessian: Array, name: str, order: Array | None = None) -> tuple[Array, Array]:
    """Return the order of input features, and the upper Cholesky factor of H^-1 in that order, H damped.

    Args:
        hessian: sum of x x' over tokens, (K, K).
        name: Name of the matrix in errors.
        order: Order of the features; None for activation order.

    Raises:
        CheckpointError: An activation is not finite.
        ConfigError: H cannot be factorized.
    """
    if order is None:
        order = np.argsort(-np.diagonal(hessian).astype(np.float64), kind="stable")
    # With H = R R' and R upper triangular, which is the Cholesky factor of H read from its far end, the
    # inverse of H is U' U with U = R^-1.
    backwards = damp(hessian, name, np.float32)[np.ix_(order[::-1], order[::-1])]
    lower, failed = _invert_root(backwards)
    if failed:
        lower, failed = _invert_root(damp(hessian, name)[np.ix_(order[::-1], order[::-1])])
    if failed:
        raise ConfigError(
            f"the calibration text does not determine {name}: its Hessian of {len(hessian)} features "
            "is singular",
            hint="use a longer calibration text",
        )
    return order, lower[::-1, ::-1]


def _invert_root(matrix: Array) -> tuple[Array, int]:
    """Return the inverse of the lower Cholesky factor of a matrix, which is overwritten, and 0 on success."""
    from scipy.linalg.lapack import get_lapack_funcs

    root, invert = get_lapack_funcs(("potrf", "trtri"), (matrix,))
    # LAPACK reads matrices by columns, and this one is symmetric.
    lower, failed = root(matrix.T, lower=1, clean=1, overwrite_a=1)
    if not failed:
        lower, failed = invert(lower, lower=1, overwrite_c=1)
    return lower, failed


def damp(hessian: Array, name: str, element: type[np.float64] | type[np.float32] = np.float64) -> Array:
    """Add DAMPING of the mean to the diagonal of H, and 1 where the text does not use a feature.

    Args:
        hessian: As for `factorize`.
        name: Name of the matrix in errors.
        element: Type of the result's numbers.

    Raises:
        CheckpointError: An activation is not finite.
    """
    if not np.isfinite(hessian).all():
        raise CheckpointError(
            f"the inputs of {name} on the calibration text are not all finite",
            hint="the checkpoint is damaged, or needs a target without calibration",
        )
    matrix: Array = hessian.astype(element)
    diagonal = np.diagonal(hessian).astype(np.float64)
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
