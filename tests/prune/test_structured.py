"""Errors, refits and 2:4 masks against what they are by definition, in float64."""

import numpy as np
import pytest

from llmc.calibration.hessian import DAMPING, damp
from llmc.errors import CheckpointError, UnsupportedError
from llmc.prune.sparse import is_sparse, sparsify
from llmc.prune.structured import refit, unit_errors

Array = np.ndarray
FEATURES = 24


def _problem(features: int = FEATURES) -> tuple[Array, Array]:
    """Weights (10, K), and correlated inputs' sum of x x' (K, K)."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((300, features)) @ random.standard_normal((features, features))
    return random.standard_normal((10, features)).astype(np.float32), inputs.T @ inputs


def _error(lost: Array, hessian: Array) -> float:
    return float(np.einsum("nk,kl,nl->", lost, hessian, lost))


def _refitted(weights: Array, hessian: Array, kept: Array) -> Array:
    """The stationary point of the damped error, column by column of the normal equations."""
    solved = np.zeros(weights.shape)
    solved[:, kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[kept] @ weights.T).T
    return solved


def test_a_refit_is_the_least_squares_solution() -> None:
    weights, hessian = _problem()
    kept = np.array([0, 3, 4, 9, 10, 15, 20, 23])
    expected = _refitted(weights.astype(np.float64), damp(hessian, "w"), kept)[:, kept]
    np.testing.assert_allclose(refit(weights, hessian, kept, "w"), expected, rtol=1e-4, atol=1e-5)


def test_a_refit_leaves_weights_that_the_text_does_not_use() -> None:
    weights, hessian = _problem()
    hessian[5] = hessian[:, 5] = 0
    kept = np.arange(2, FEATURES)
    np.testing.assert_allclose(refit(weights, hessian, kept, "w")[:, 3], weights[:, 5], rtol=1e-5)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("repair", [False, True])
def test_errors_of_units_are_those_of_leaving_them_out(width: int, repair: bool) -> None:
    weights, hessian = _problem()
    damped = damp(hessian, "w")
    expected = []
    for start in range(0, FEATURES, width):
        kept = np.delete(np.arange(FEATURES), np.arange(start, start + width))
        left = np.zeros(weights.shape)
        left[:, kept] = weights[:, kept]
        if repair:
            left = _refitted(weights.astype(np.float64), damped, kept)
        expected.append(_error(left - weights, damped))
    found = unit_errors(weights, hessian, width, "w", repair=repair)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def _written_out(weights: Array, hessian: Array) -> Array:
    """SparseGPT, one input and one inverse at a time."""
    left = weights.astype(np.float64)
    inverse = np.linalg.inv(hessian + DAMPING * np.diagonal(hessian).mean() * np.eye(len(hessian)))
    gone = np.zeros(weights.shape, bool)
    for i in range(len(hessian)):
        if i % 4 == 0:
            # The diagonal as it will be when each of the four has its turn.
            rest, diagonal = inverse.copy(), []
            for j in range(i, i + 4):
                diagonal.append(rest[j, j])
                rest -= np.outer(rest[j], rest[j]) / rest[j, j]
            scores = left[:, i : i + 4] ** 2 / np.array(diagonal)
            np.put_along_axis(gone[:, i : i + 4], np.argsort(scores, axis=1)[:, :2], True, axis=1)
        error = np.where(gone[:, i], left[:, i], 0) / inverse[i, i]
        left -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[i], inverse[i]) / inverse[i, i]
        inverse[i] = inverse[:, i] = 0
    return np.where(gone, 0, left)


def test_2_4_equals_sparsegpt_written_out() -> None:
    weights, hessian = _problem(160)  # more than one lazy block
    found = sparsify(weights, hessian, "w", repair=True)
    assert is_sparse(found)
    np.testing.assert_allclose(found, _written_out(weights, hessian), rtol=1e-3, atol=1e-3)


def test_repair_of_2_4_pays() -> None:
    weights, hessian = _problem()
    plain, repaired = (sparsify(weights, hessian, "w", repair=repair) for repair in (False, True))
    assert is_sparse(plain)
    assert set(plain[plain != 0]) <= set(weights.flat)
    assert _error(repaired - weights, hessian) < 0.7 * _error(plain - weights, hessian)


def test_what_is_not_sparse() -> None:
    assert not is_sparse(np.array([[1.0, 1, 1, 0]]))
    assert not is_sparse(np.array([[1.0, 0, 0]]))
    assert is_sparse(np.array([[1.0, 0, 0, 1, 0, 0, 0, 0]]))


def test_refusals() -> None:
    weights, hessian = _problem()
    with pytest.raises(UnsupportedError, match="2:4 sparsity needs a multiple of 4 inputs, and w has 22"):
        sparsify(weights[:, :22], hessian[:22, :22], "w", repair=True)
    hessian[0, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"the inputs of w .* not all finite"):
        unit_errors(weights, hessian, 1, "w", repair=True)
