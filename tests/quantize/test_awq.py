"""Scaled channels against the search written out on activations, and through a build."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmc.calibration.hessian import weigh_features
from llmc.config import CalibrationText, Gate, Metric, Quantization
from llmc.data import eval_text
from llmc.pipeline import build, verify
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.quantize.activations import read_smoothing
from llmc.quantize.awq import EXPONENTS, divide_outputs, search_channels
from llmc.quantize.blocks import dequantize_blocks
from llmc.quantize.encode import quantize_blocks
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model
from tests.quantize.reference import Array, scheme

KIND = scheme(4, 32, False, "gptq")
SEARCHED = scheme(4, 32, False, "mse")
REASON = "a tiny random model"


def _activations(features: int, loud: int) -> Array:
    random = np.random.default_rng(1)
    sizes = np.exp(0.3 * random.standard_normal(features))
    sizes[::17] *= loud
    return random.standard_normal((300, features)) * sizes


def _weights(outputs: int, features: int, seed: int) -> Array:
    random = np.random.default_rng(seed)
    sizes = np.exp(0.3 * random.standard_normal(features))
    return (random.standard_normal((outputs, features)) * sizes).astype(np.float32)


def _error(weights: list[Array], inputs: Array, factors: Array) -> float:
    """Squared error of the products, token by token."""
    squares = (inputs**2).sum(0) / factors**2
    total = 0.0
    for matrix in weights:
        blocks = quantize_blocks(matrix * factors, SEARCHED, np.float32, "w", weigh_features(squares))
        total += float(np.square(inputs @ (dequantize_blocks(blocks) / factors - matrix).T).sum())
    return total


def test_the_best_exponent_on_the_activations_is_taken() -> None:
    weights, inputs = [_weights(24, 96, 2), _weights(8, 96, 3)], _activations(96, loud=8)
    found = search_channels(weights, inputs.T @ inputs, [KIND, KIND], "w")
    assert found is not None
    loud = np.sqrt((inputs**2).sum(0))
    heavy = np.concatenate([np.abs(w) for w in weights]).mean(0)
    tried = [loud**a / heavy ** (1 - a) for a in EXPONENTS]
    tried = [s / np.exp(np.log(s).mean()) for s in tried]
    errors = [_error(weights, inputs, s) for s in tried]
    np.testing.assert_allclose(found, tried[int(np.argmin(errors))], rtol=1e-5)
    assert min(errors) < 0.9 * _error(weights, inputs, np.ones(96))


def test_channels_stay_where_none_are_better() -> None:
    """Weights of one size on a grid that their blocks find again."""
    random = np.random.default_rng(0)
    weights = random.integers(-7, 9, (32, 64)).astype(np.float32)
    weights[:, ::32], weights[:, 1::32] = -7, 8
    inputs = random.standard_normal((200, 64)) * np.exp(random.standard_normal(64))
    assert search_channels([weights], inputs.T @ inputs, [KIND], "w") is None


def test_a_channel_that_is_never_used_has_a_finite_factor() -> None:
    weights, inputs = [_weights(24, 96, 2)], _activations(96, loud=8)
    inputs[:, 5] = 0
    found = search_channels(weights, inputs.T @ inputs, [KIND], "w")
    assert found is not None
    assert np.isfinite(found).all()
    assert (found > 0).all()


def test_outputs_are_divided_by_their_scales() -> None:
    blocks = quantize_blocks(_weights(16, 64, 2), SEARCHED)
    factors = np.exp(np.random.default_rng(0).standard_normal(4)).astype(np.float32)
    found = replace(blocks, scales=divide_outputs(blocks.scales, 3, 7, factors))
    expected = dequantize_blocks(blocks)
    expected[3:7] /= factors[:, None]
    np.testing.assert_allclose(dequantize_blocks(found), expected, rtol=1e-6)


def test_channels_without_calibration_are_refused() -> None:
    rules = ({"scheme": scheme(method="mse")},)
    with pytest.raises(ValueError, match="scale_channels needs calibration"):
        Quantization.model_validate({"accuracy_level": 4, "rules": rules, "scale_channels": True})


def test_a_built_model_is_the_original_with_scaled_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    output = tmp_path / "artifact"
    plan = plan_build(str(model), target="cpu-int4-gptq", profile="local", output=output, verify=False)
    assert plan.target.quantize is not None
    text = CalibrationText(window_tokens=64, max_windows=8)
    changed = {"calibration": text, "scale_channels": True}
    gates = (
        Gate(metric=Metric.PREFILL_MAX_ABS, max=1e-3, reason=REASON),
        Gate(metric=Metric.WEIGHTS_SNR, min=10, reason=REASON),
        Gate(metric=Metric.TEXT_KL_MEAN, max=0.1, reason=REASON),
    )
    quantize = plan.target.quantize.model_copy(update=changed)
    target = plan.target.model_copy(update={"quantize": quantize, "gates": gates})
    build(plan.model_copy(update={"target": target}), SilentProgress())
    scaled = {n.removesuffix(".weight").split(".")[-1] for n in read_smoothing(output)}
    assert scaled == {"q_proj", "gate_proj", "down_proj"}
    (tmp_path / "text").write_text(eval_text()[:4000])
    assert (
        verify(output, str(model), (str(tmp_path / "text"),), SilentProgress(), own_gates=True).failure()
        is None
    )
