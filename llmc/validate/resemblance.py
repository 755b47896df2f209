"""Check matrices whose codes cannot be computed again for what all roundings of a matrix have in common.

Calibration decides the codes, and machines differ in the last digits of a search; but rounding is not biased.
With w the checkpoint's matrix, w' the stored one, and D = sum (w' - w)**2 / sum w**2, the gain
g = sum w w' / sum w**2 is 1 - D where scales minimize the error (w' - w is orthogonal to w'), and 1 where the
error is independent of w. For GPTQ on SmolLM2-135M with rescaled channels, 4 and 8 bits, g lies between
1 - D and 1, and g of single blocks between 0.76 and 1.13; scales that are 2 % too wide move g by 0.02, and a
block that was lost or exchanged has a gain of 0.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from llmc.arrays import Array
from llmc.graph.weights import Rows, row_chunks
from llmc.validate.stored import Stored

#: The lowest and highest plausible gain of a block.
_BLOCK_GAIN = (0.25, 1.75)
#: Tolerance of a matrix's gain beyond its range, and standard deviations of chance in addition.
_BIAS, _DEVIATIONS = 0.003, 4.0
#: Blocks whose squared weights sum to less count as zeros.
_TINY = 1e-30


def find_strangers(stored: Mapping[str, Stored], sources: Mapping[str, Rows]) -> list[str]:
    """Describe matrices that are not a rounding of the checkpoint's, a sentence each.

    Args:
        stored: The matrices as the artifact stores them, by the names of `sources`.
        sources: The rows that each is quantized from, by the name of its initializer before quantization.

    Raises:
        ParityError: The values of a matrix cannot be read.
    """
    return [
        f"{name} {why}"
        for name in stored
        if (why := describe_stranger(sources[name], stored[name])) is not None
    ]


def describe_stranger(rows: Rows, stored: Stored) -> str | None:
    """Describe why `stored` cannot be a rounding of `rows`; None if it can."""
    cross = signal = noise = 0.0
    count = 0
    for start, stop in row_chunks(rows):
        expected = np.atleast_1d(rows.rows(start, stop).astype(np.float32))
        actual = stored.read(start, stop)
        if not np.isfinite(actual).all():
            return f"has values that are not finite in rows {start} to {stop}"
        for row, block, gain in _outliers(expected, actual, stored.block):
            return f"has a gain of {gain:.2f} in block {block} of row {start + row}, where a rounding has 1"
        cross += float(np.sum(expected * actual, dtype=np.float64))
        signal += float(np.sum(expected * expected, dtype=np.float64))
        noise += float(np.sum((expected - actual) ** 2, dtype=np.float64))
        count += expected.size
    if signal < _TINY:
        return None if noise < _TINY else "is not zero as the checkpoint's is"
    gain, lost = cross / signal, noise / signal
    chance = _BIAS + _DEVIATIONS * math.sqrt(lost / count)
    if 1 - lost - chance <= gain <= 1 + chance:
        return None
    return f"has a gain of {gain:.4f}, where a rounding that loses {lost:.4f} has {1 - lost:.4f} to 1"


def _outliers(expected: Array, actual: Array, block: int) -> Iterator[tuple[int, int, float]]:
    """Yield row, block and gain of blocks whose gain no rounding has."""
    wide = [a.reshape(-1, a.shape[-1]) for a in (expected * actual, expected * expected)]
    starts = np.arange(0, wide[0].shape[1], block)
    cross, signal = (np.add.reduceat(a, starts, axis=1) for a in wide)
    gain = np.divide(cross, signal, out=np.ones_like(cross), where=signal > _TINY)
    low, high = _BLOCK_GAIN
    for row, index in np.argwhere((gain < low) | (gain > high)):
        yield int(row), int(index), float(gain[row, index])
