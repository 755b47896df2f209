"""Round activations and weights to the types in which products are computed, and back, with torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmc.config import WeightFormat
from llmc.quantize.formats import HIGHEST, NVFP4_BLOCK

if TYPE_CHECKING:
    import torch


def noise_db(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Return the signal-to-noise ratio of the mean token, in dB; 200 if nothing differs."""
    noise = float(relative_noise(expected, actual).mean())
    return -10 * math.log10(noise) if noise > 0 else 200.0


def relative_noise(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Return the energy of each token's difference, relative to the token's energy."""
    return ((expected - actual) ** 2).sum(1) / (expected**2).sum(1).clamp(min=1e-20)


def fake_quantize(x: torch.Tensor, kind: WeightFormat, peak: float) -> torch.Tensor:
    """Return activations (tokens, K) quantized and dequantized, with the range that `peak` gives."""
    import torch

    if peak == 0:
        return x
    high = HIGHEST[kind]
    if kind is not WeightFormat.NVFP4:
        return _cast(x / (peak / high), kind) * (peak / high)
    whole = peak / (high * HIGHEST[WeightFormat.FP8])
    blocks = x.reshape(len(x), -1, NVFP4_BLOCK)
    scale = _cast(blocks.abs().amax(2, keepdim=True) / high / whole, WeightFormat.FP8) * whole
    scale = torch.where(scale == 0, torch.full_like(scale, whole), scale)
    return (_cast(blocks / scale, kind) * scale).reshape(x.shape)


def fake_weights(weights: torch.Tensor, kind: WeightFormat) -> torch.Tensor:
    """Return weights (N, K), or tokens with own scales, quantized with scales that just span each row."""
    if kind is WeightFormat.NVFP4:
        return fake_quantize(weights, kind, float(weights.abs().max()))
    scale = weights.abs().amax(1, keepdim=True).clamp(min=1e-12) / HIGHEST[kind]
    return _cast(weights / scale, kind) * scale


def _cast(codes: torch.Tensor, kind: WeightFormat) -> torch.Tensor:
    """Return the nearest codes of a type, float32."""
    import torch

    high = HIGHEST[kind]
    codes = codes.clamp(-high, high)
    if kind is WeightFormat.FP8:
        return codes.to(torch.float8_e4m3fn).float()
    if (
        kind is WeightFormat.NVFP4
    ):  # 0, 0.5, 1, 1.5, 2, 3, 4, 6: steps of 0.5 below 2, of 1 below 4, then of 2
        size = codes.abs()
        step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        return torch.sign(codes) * torch.round(size / step) * step
    return codes.round()
