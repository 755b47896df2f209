"""GPTQ against optimal brain quantization written out, one feature and one inverse at a time, in float64."""

from dataclasses import replace

import numpy as np
import pytest

from llmc.calibration.hessian import DAMPING, weigh_features
from llmc.errors import CheckpointError, ConfigError
from llmc.quantize.blocks import dequantize_blocks, unpack
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.methods.gptq import quantize_gptq
from tests.quantize.reference import Array, scheme


def _inputs(features: int, tokens: int = 400) -> Array:
    """Correlated activations with some large features."""
    random = np.random.default_rng(1)
    mixing = random.standard_normal((features, features)) * np.exp(random.standard_normal(features))
    return random.standard_normal((tokens, features)) @ mixing / features**0.5


def _weights(outputs: int, features: int) -> Array:
    return np.random.default_rng(2).standard_normal((outputs, features)).astype(np.float32)


def _written_out(weights: Array, hessian: Array, scales: Array, zeros: Array, bits: int, size: int) -> Array:
    """Codes (N, K): round a feature, move what is left to the others, take the feature out of the inverse."""
    left = weights.astype(np.float64)
    diagonal = np.diagonal(hessian)
    inverse = np.linalg.inv(hessian + DAMPING * diagonal.mean() * np.eye(len(hessian)))
    codes = np.zeros(weights.shape, np.uint8)
    for feature in np.argsort(-diagonal):
        block = feature // size
        code = np.clip(np.rint(left[:, feature] / scales[:, block]) + zeros[:, block], 0, 2**bits - 1)
        codes[:, feature] = code
        error = left[:, feature] - (code - zeros[:, block]) * scales[:, block]
        row = inverse[feature].copy()
        left -= np.outer(error / row[feature], row)
        inverse -= np.outer(row, row) / row[feature]
        inverse[feature] = inverse[:, feature] = 0
    return codes


def _solved(weights: Array, levels: Array, hessian: Array, size: int) -> Array:
    """Scales (N, blocks) of least error (w - s q) H (w - s q)', row by row."""
    root = np.linalg.cholesky(hessian)
    scales = np.empty((len(weights), weights.shape[1] // size))
    for row, (matrix, codes) in enumerate(zip(weights, levels, strict=True)):
        parts = np.zeros((len(codes), scales.shape[1]))
        parts[np.arange(len(codes)), np.arange(len(codes)) // size] = codes
        scales[row] = np.linalg.lstsq(root.T @ parts, root.T @ matrix, rcond=None)[0]
    return scales.astype(np.float32)


def _revised(weights: Array, codes: Array, zeros: Array, hessian: Array, bits: int, size: int) -> Array:
    """Codes (N, K) after every feature has taken its best code twice, scales solved before each time."""
    damped = hessian + DAMPING * np.diagonal(hessian).mean() * np.eye(len(hessian))
    zeros = np.repeat(zeros, size, 1)
    codes = codes.astype(np.float64)
    for _ in range(2):
        scales = np.repeat(_solved(weights, codes - zeros, damped, size), size, 1)
        for feature in np.argsort(-np.diagonal(hessian)):
            slope = ((codes - zeros) * scales - weights) @ damped[:, feature]
            best = codes[:, feature] - slope / damped[feature, feature] / scales[:, feature]
            codes[:, feature] = np.clip(np.rint(best), 0, 2**bits - 1)
    return codes


@pytest.mark.parametrize(
    ("bits", "size", "symmetric"), [(4, 32, False), (4, 16, True), (4, 64, False), (8, 32, True)]
)
def test_equals_optimal_brain_quantization_with_revised_codes(bits: int, size: int, symmetric: bool) -> None:
    kind = scheme(bits, size, symmetric, "gptq")
    weights, inputs = _weights(24, 192), _inputs(192)
    hessian = inputs.T @ inputs
    found = quantize_gptq(weights, hessian, kind, np.float32, "w")
    important = weigh_features(np.diagonal(hessian))
    start = quantize_blocks(weights, scheme(bits, size, symmetric, "mse"), importance=important)
    blocks = start.scales.shape[1]
    zeros = (
        np.full(start.scales.shape, 2 ** (bits - 1))
        if start.zero_points is None
        else unpack(start.zero_points, bits, blocks)
    )
    expected = _written_out(weights, hessian, start.scales, zeros.astype(np.float64), bits, size)
    expected = _revised(weights, expected, zeros.astype(np.float64), hessian, bits, size)
    codes = unpack(found.codes, bits, size).reshape(len(weights), -1)
    assert (codes == expected).mean() >= 0.98  # a code that is nearly halfway may go the other way


def _error(weights: Array, read_back: Array, inputs: Array) -> float:
    return float(np.square(inputs @ (read_back - weights).T).sum())


@pytest.mark.parametrize("features", [192, 200, 33])
def test_outputs_come_closer_than_with_the_nearest_codes(features: int) -> None:
    weights, inputs = _weights(40, features), _inputs(features)
    hessian = inputs.T @ inputs
    plain = dequantize_blocks(quantize_blocks(weights, scheme(4, 32, False, "mse")))
    kind = scheme(4, 32, False, "gptq")
    found = dequantize_blocks(quantize_gptq(weights, hessian, kind, np.float32, "w"))
    assert found.shape == weights.shape
    assert _error(weights, found, inputs) < 0.5 * _error(weights, plain, inputs)


def test_unrelated_features_have_the_nearest_codes() -> None:
    weights = _weights(16, 96)
    found = quantize_gptq(weights, np.eye(96), scheme(4, 32, False, "gptq"), np.float32, "w")
    alike = weigh_features(np.ones(96))
    plain = quantize_blocks(weights, scheme(4, 32, False, "mse"), importance=alike)
    first, second = (unpack(b.codes, 4, 32) for b in (found, plain))
    assert (first == second).mean() >= 0.99  # scales that are solved again move a code that is nearly halfway


def test_features_that_are_always_zero_change_nothing() -> None:
    weights, inputs = _weights(16, 64), _inputs(64)
    inputs[:, 5] = 0
    hessian = inputs.T @ inputs
    found = quantize_gptq(weights, hessian, scheme(4, 32, False, "gptq"), np.float32, "w")
    important = weigh_features(np.diagonal(hessian))
    plain = quantize_blocks(weights, scheme(4, 32, False, "mse"), importance=important)
    first, second = (unpack(b.codes, 4, 32).reshape(16, 64)[:, 5] for b in (found, plain))
    np.testing.assert_array_equal(first, second)


def test_no_other_scales_of_a_row_leave_less_error() -> None:
    weights, inputs = _weights(8, 96), _inputs(96)
    hessian = inputs.T @ inputs
    found = quantize_gptq(weights, hessian, scheme(4, 32, False, "gptq"), np.float32, "w")
    damped = hessian + DAMPING * np.diagonal(hessian).mean() * np.eye(96)

    def error(scales: Array) -> Array:
        left = dequantize_blocks(replace(found, scales=scales)) - weights
        return np.einsum("ij,jk,ik->i", left, damped, left)

    least = error(found.scales)
    for block in range(3):
        for factor in (0.99, 1.01):
            moved = found.scales.copy()
            moved[:, block] *= np.float32(factor)
            assert (error(moved) >= least * (1 - 1e-5)).all()


def test_activations_that_are_not_finite_are_named() -> None:
    hessian = np.eye(32)
    hessian[3, 4] = np.nan
    with pytest.raises(CheckpointError, match=r"inputs of layer.up .* are not all finite"):
        quantize_gptq(_weights(4, 32), hessian, scheme(4, 32, False, "gptq"), np.float32, "layer.up")


def test_a_singular_hessian_is_named() -> None:
    hessian = np.eye(32)
    hessian[:2, :2] = [[1, 3], [3, 1]]
    with pytest.raises(
        ConfigError, match=r"does not determine layer.up: its Hessian of 32 features"
    ) as caught:
        quantize_gptq(_weights(4, 32), hessian, scheme(4, 32, False, "gptq"), np.float32, "layer.up")
    assert caught.value.hint == "use a longer calibration text"
