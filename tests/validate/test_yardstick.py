"""Plain rounding as a yardstick: its values, and the ratio of the artifact's divergence to that of it."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from llmc.config import Metric
from llmc.validate.yardstick import FLOOR, Rounding, compare_with_rounding, round_blocks

WEIGHTS = np.random.default_rng(5).standard_normal((6, 80)).astype(np.float32)


def test_rounds_to_the_nearest_of_evenly_spaced_values() -> None:
    for row in round_blocks(WEIGHTS, Rounding(4, 32, False, 6)):
        for start in range(0, 80, 32):
            assert len(np.unique(row[start : start + 32])) <= 16
    error = np.abs(round_blocks(WEIGHTS, Rounding(4, 32, False, 6)) - WEIGHTS)
    spans = [np.ptp(np.append(WEIGHTS[:, at : at + 32], np.zeros((6, 1)), axis=1), axis=1) for at in (0, 32)]
    for block, span in enumerate(spans):
        # Rounding the zero point moves both ends by half a step at most.
        assert (error[:, 32 * block : 32 * block + 32].max(axis=1) <= 1.001 * span / 15).all()


def test_symmetric_rounding_is_that_of_q8_0() -> None:
    weights = WEIGHTS[:, :64]
    expected = quants.dequantize(
        quants.quantize(weights, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0
    )
    made = round_blocks(weights, Rounding(8, 32, True, 6))
    np.testing.assert_allclose(made, expected, atol=3e-3)  # that one has its scales in float16


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_zeros_stay_zeros(symmetric: bool) -> None:
    assert not round_blocks(np.zeros((2, 32), np.float32), Rounding(4, 32, symmetric, 2)).any()


def test_ratio_to_the_yardstick() -> None:
    artifact, rounding = np.array([0.2, 0.3, 0.25, 0.2]), np.array([0.4, 0.5, 0.55, 0.45])
    made = compare_with_rounding(artifact, rounding, "here")
    assert made.metric is Metric.TEXT_KL_RATIO
    assert made.value == pytest.approx(0.95 / 1.9)
    assert made.low is not None
    assert made.low < made.value < made.high
    residuals = artifact - 0.5 * rounding
    half = 3.1824 * residuals.std(ddof=1) / 2 / rounding.mean()
    assert made.high - made.value == pytest.approx(half, rel=1e-3)


def test_a_yardstick_that_loses_next_to_nothing() -> None:
    made = compare_with_rounding(np.array([0.004, 0.006]), np.array([1e-4, 3e-4]), "here")
    assert made.value == pytest.approx(0.005 / FLOOR)
    assert "0.02 is used instead" in made.detail
