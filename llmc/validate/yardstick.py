"""Compute the yardstick of quantized targets: the original, its matrices rounded plainly to as many bits.

How much a model loses at 4 bits depends on the model, so that one bound on KL divergence cannot distinguish a
good artifact from a bad one for all models. The yardstick is the result without search or calibration: each
block of neighbouring inputs is rounded to nearest between its least and its largest weight (zero included),
or up to its largest magnitude where the scheme is symmetric.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement
from llmc.config import Metric
from llmc.graph.weights import Rows
from llmc.validate.interval import ratio_interval
from llmc.validate.measure import measured
from llmc.validate.stored import Stored

#: Nats per token. If plain rounding loses less than this, the artifact is compared with this value.
FLOOR = 0.02


@dataclass(frozen=True)
class Rounding:
    """The parameters of the rounding of one matrix.

    Args:
        bits: Bits of a code.
        block: Number of neighbouring inputs that share a scale.
        symmetric: Whether the zero point is fixed in the middle.
        outputs: Number of output features, which distinguishes rows of outputs from rows of inputs.
    """

    bits: int
    block: int
    symmetric: bool
    outputs: int


def round_weights(rows: Mapping[str, Rows], roundings: Mapping[str, Rounding]) -> dict[str, Stored]:
    """Return the rounded matrices, each read by rows on demand.

    Args:
        rows: The original's values of each matrix, by name.
        roundings: How each matrix is rounded, by the same names.
    """
    return {name: _rounded(rows[name], rounding) for name, rounding in roundings.items()}


def round_blocks(weights: Array, rounding: Rounding) -> Array:
    """Round `weights` (..., inputs) by blocks along the last axis; float32 of the same shape."""
    import torch

    inputs = weights.shape[-1]
    flat = torch.from_numpy(np.array(weights, np.float32).reshape(-1, inputs))
    flat = torch.nn.functional.pad(flat, (0, -inputs % rounding.block))
    blocks = flat.reshape(len(flat), -1, rounding.block)
    if rounding.symmetric:
        most = (1 << (rounding.bits - 1)) - 1
        scale = blocks.abs().amax(-1, keepdim=True) / most
        zero = torch.zeros_like(scale)
    else:
        most = (1 << rounding.bits) - 1
        low = blocks.amin(-1, keepdim=True).clamp_(max=0)
        high = blocks.amax(-1, keepdim=True).clamp_(min=0)
        scale = (high - low) / most
        zero = torch.round(-low / torch.where(scale == 0, 1, scale))
    codes = (blocks / torch.where(scale == 0, 1, scale)).round_().add_(zero)
    codes = codes.clamp_(-most if rounding.symmetric else 0, most)
    rounded: Array = codes.sub_(zero).mul_(scale).reshape(flat.shape)[:, :inputs].numpy()
    return rounded.reshape(weights.shape)


def compare_with_rounding(artifact: Array, rounding: Array, where: str) -> Measurement:
    """Measure TEXT_KL_RATIO: the artifact's KL divergence over plain rounding's, on the same windows.

    Args:
        artifact: Mean KL divergence of each window, nats per token.
        rounding: Mean KL divergence of each window of the original with plainly rounded weights.
    """
    below = float(rounding.mean()) < FLOOR
    divisor = np.maximum(rounding, FLOOR) if below else rounding
    value = float(artifact.mean() / divisor.mean())
    detail = f"{len(artifact)} windows; rounding to nearest in the same bits costs {rounding.mean():.4g} nats"
    if below:
        detail += f", and {FLOOR:g} is used instead"
    figures = {"kl_artifact": float(artifact.mean()), "kl_rounding": float(rounding.mean())}
    return measured(Metric.TEXT_KL_RATIO, value, detail, where, figures, ratio_interval(artifact, divisor))


def _rounded(rows: Rows, rounding: Rounding) -> Stored:
    by_output = rows.shape[-2 if len(rows.shape) > 2 else 0] == rounding.outputs
    if by_output:
        return Stored(
            rows.shape, lambda start, stop: round_blocks(rows.rows(start, stop), rounding), rounding.block
        )
    whole: list[Array] = []

    def read(start: int, stop: int) -> Array:
        if not whole:
            values = rows.rows(0, rows.shape[0])
            whole.append(np.swapaxes(round_blocks(np.swapaxes(values, -1, -2), rounding), -1, -2))
        return whole[0][start:stop]

    return Stored(rows.shape, read, rounding.block)
