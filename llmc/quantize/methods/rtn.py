"""Round to nearest with the scale that just spans a block, without a search."""

from typing import NamedTuple

import numpy as np

from llmc.arrays import Array
from llmc.config import WeightScheme
from llmc.config.method import RoundToNearest
from llmc.quantize.blocks import SMALLEST, ScaleType, Workspace, invert, round_scales, zero_level
from llmc.quantize.methods import Handler


class BlockRange(NamedTuple):
    """The range that a block covers, float32 (n,) each.

    Args:
        scale: Scale that spans the block, not yet rounded to its stored type; 0 for a block of zeros.
        low: Value that code 0 represents; unused if symmetric.
    """

    scale: Array
    low: Array


def span_columns(work: Workspace, scheme: WeightScheme) -> BlockRange:
    """Return the span of every column.

    In a symmetric scheme the element of largest magnitude becomes level -2**(bits-1) exactly, so that the
    scale has the opposite sign (the rule of ONNX Runtime's own quantizer and of GGUF's Q4_0). All levels are
    used, whereas amax / (2**(bits-1) - 1) leaves one idle. In an asymmetric scheme the range from the lowest
    to the highest value, widened to include 0, is cut into 2**bits - 1 steps.
    """
    low, high = work.extremes()
    middle = zero_level(scheme)
    if scheme.symmetric:
        scale = low
        np.copyto(scale, high, where=high > -low)
        scale /= np.float32(-middle)
    else:
        np.minimum(low, 0, out=low)
        scale = (np.maximum(high, 0) - low) / np.float32(2 * middle - 1)
    scale[np.abs(scale) < SMALLEST] = 0
    return BlockRange(scale, low)


def place_zero(low: Array, inverse: Array, spare: float, scheme: WeightScheme) -> Array:
    """Return the code of 0 when `low` lies `spare` steps above code 0, float32 (n,)."""
    middle = zero_level(scheme)
    if scheme.symmetric:
        return np.full_like(low, middle)
    zero: Array = np.rint(np.float32(spare) - low * inverse)
    return np.clip(zero, 0, 2 * middle - 1, out=zero)


def fit_rtn(work: Workspace, scheme: WeightScheme, scale_type: ScaleType) -> tuple[Array, Array]:
    """Return scales, as `scale_type` holds them, and zero points of `work.columns`, float32 (n,) each."""
    span = span_columns(work, scheme)
    return round_scales(span.scale, scale_type), place_zero(span.low, invert(span.scale), 0.0, scheme)


class RoundToNearestHandler(Handler):
    """The handler of `RoundToNearest`."""

    method = RoundToNearest
    only_extremes = True

    def fit(self, work: Workspace, scheme: WeightScheme, scale_type: ScaleType) -> tuple[Array, Array]:
        return fit_rtn(work, scheme, scale_type)


HANDLER = RoundToNearestHandler()
