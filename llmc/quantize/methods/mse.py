"""Minimize the squared error: search scales block by block, without calibration data.

For given codes q (minus their zero point) the best scale is sum(w q) / sum(q q), and for a given scale the
best codes are the nearest ones. The search starts from several scales around the one that spans the block,
some clipping its extremes and some leaving levels idle; the one with the least error after the closed form is
chosen, rounded again and improved once more. It is the search of GGUF's k-quants (make_qx_quants and
make_qkx2_quants in ggml-quants.c) with a zero point that is a code, and with weights as important as the
workspace states: all the same, or as the mean squares of what they multiply. Starts are compared by sum(w
q)^2 / sum(q q), the part of sum(w w) that their best scales explain; the last comparison, with the scale that
just spans the block, uses residuals, which keep their precision at 8 bits too.
"""

import numpy as np

from llmc.arrays import Array
from llmc.config import WeightScheme
from llmc.config.method import LeastSquares
from llmc.quantize.blocks import ScaleType, Workspace, invert, round_scales, round_to_levels, zero_level
from llmc.quantize.methods import Handler
from llmc.quantize.methods.rtn import place_zero, span_columns

#: Levels that the starts add to the ones that span the block (negative: idle, positive: clipped), lowest and
#: highest, by block size: the 2nd to 98th percentile of the optimum on normal, Student t and trained weights.
_EXTRA_4_BIT = {16: (-1.8, 0.6), 32: (-1.2, 0.8), 64: (-0.8, 1.4), 128: (-0.3, 2.0)}
_EXTRA_8_BIT = (-2.0, 0.6)

#: Number of starts; more of them gain less than 0.02 dB.
_STARTS = 5


def fit_mse(work: Workspace, scheme: WeightScheme, scale_type: ScaleType) -> tuple[Array, Array]:
    """Return scales, as `scale_type` holds them, and zero points of `work.columns`, float32 (n,) each.

    The error of a block is never larger than with `fit_rtn`.
    """
    span = span_columns(work, scheme)
    inverse = invert(span.scale)
    steps = zero_level(scheme) if scheme.symmetric else 2 * zero_level(scheme) - 1
    lowest, highest = _EXTRA_4_BIT[scheme.block_size] if scheme.bits == 4 else _EXTRA_8_BIT

    plain_zero = place_zero(span.low, inverse, 0.0, scheme)
    zero = plain_zero.copy()
    ratio = np.ones_like(inverse)
    most = np.full_like(inverse, -1)
    for extra in np.linspace(lowest, highest, _STARTS):
        start = np.float32(steps / (steps + extra))
        tried = inverse / start
        tried_zero = zero if scheme.symmetric else place_zero(span.low, tried, -extra / 2, scheme)
        round_to_levels(work, tried, tried_zero, scheme)
        gain, explained = _improve(work)
        explained *= start**2
        better = explained > most
        np.copyto(most, explained, where=better)
        np.copyto(ratio, gain * start, where=better)
        if not scheme.symmetric:
            np.copyto(zero, tried_zero, where=better)

    round_to_levels(work, inverse / ratio, zero, scheme)
    ratio *= _improve(work)[0]

    plain = round_scales(span.scale, scale_type)
    searched = round_scales(span.scale * ratio, scale_type)
    plain_error = _measure(work, plain, plain_zero, inverse, scheme)
    keep_plain = plain_error <= _measure(work, searched, zero, inverse, scheme)
    np.copyto(searched, plain, where=keep_plain)
    np.copyto(zero, plain_zero, where=keep_plain)
    return searched, zero


def _improve(work: Workspace) -> tuple[Array, Array]:
    """Return the best scale for the levels, relative to the scale of the rounding, and what it explains.

    Both are float32 (n,); what it explains is the part of sum(w w) that does not remain as error, in squares
    of the scale of the rounding.
    """
    cross = work.dot(work.scaled, work.levels)
    energy = work.dot(work.levels, work.levels)
    gain = np.divide(cross, energy, out=np.ones_like(cross), where=energy > 0)
    cross *= gain
    return gain, cross


def _measure(work: Workspace, scale: Array, zero: Array, inverse: Array, scheme: WeightScheme) -> Array:
    """Return the error with a stored scale, in squares of 1 / inverse; infinite where the scale is 0."""
    round_to_levels(work, invert(scale), zero, scheme)
    residual = np.subtract(work.scaled, work.levels, out=work.scaled)
    error = work.dot(residual, residual)
    error *= (scale * inverse) ** 2
    error[scale == 0] = np.inf
    return error


class LeastSquaresHandler(Handler):
    """The handler of `LeastSquares`."""

    method = LeastSquares

    def fit(self, work: Workspace, scheme: WeightScheme, scale_type: ScaleType) -> tuple[Array, Array]:
        return fit_mse(work, scheme, scale_type)


HANDLER = LeastSquaresHandler()
