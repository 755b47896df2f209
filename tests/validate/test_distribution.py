"""What is kept of a distribution: exact choices, and a divergence that is nearly that of the whole."""

import numpy as np
import pytest

from llmc.validate.distribution import REST, Distributions, log_softmax


def logits(scale: float, seed: int = 3, vocabulary: int = 5000) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((6, vocabulary)).astype(np.float32)


def divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = (log_softmax(x.astype(np.float64)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
def test_divergence_is_nearly_that_of_the_whole(scale: float, noise: float) -> None:
    original = logits(scale)
    other = original + noise * logits(1, seed=4)
    kept = Distributions.from_bytes(Distributions.of_logits(original, np.arange(6)).to_bytes())
    exact, found = divergences(original, other), kept.divergences(other)
    rounding = 1e-6 + 2.0**-11 * np.sqrt(exact)
    assert (found - exact < rounding).all()
    assert (exact - found < 4 * REST * exact + rounding).all()


def test_choices_and_the_text_are_exact() -> None:
    original, targets = logits(4), np.array([7, 0, 4999, 3, 2, 1])
    original[0, 7] = 60.0  # all others less likely than 1e-14
    kept = Distributions.from_bytes(Distributions.of_logits(original, targets).to_bytes())
    assert kept.vocabulary == 5000
    for position, row, target in zip(kept.positions, original, targets, strict=True):
        np.testing.assert_array_equal(position.top, np.argsort(-row)[:5])
        assert position.target == log_softmax(row)[target]


def test_little_is_kept_of_a_peaked_distribution() -> None:
    made = Distributions.of_logits(logits(6, vocabulary=60_000), np.arange(6))
    assert len(made.to_bytes()) < 6 * 2 * 60_000 / 5
    assert all(len(position.codes) < 3000 for position in made.positions)
