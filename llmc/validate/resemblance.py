"""Matrices whose codes cannot be computed again, held to what any rounding of the checkpoint's has in common.

Calibration decides on the codes, and machines differ in the last digits of a search; but rounding is not
biased. With w the checkpoint's matrix, w' what is stored, and D = sum (w' - w)**2 / sum w**2, the gain
g = sum w w' / sum w**2 is 1 - D where scales leave the least error (w' - w is orthogonal to w'), and 1 where
the error has nothing to do with w. Of GPTQ on SmolLM2-135M with rescaled channels, 4 and 8 bits, g lies in
1 - D to 1, and g of single blocks in 0.76 to 1.13; scales 2 % too wide move g by 0.02, and a block that was
lost or exchanged has 0.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from llmc.arrays import Array
from llmc.graph.weights import Rows, row_chunks
from llmc.validate.stored import Stored, read_stored

#: Lowest and highest gain of a block.
_BLOCK_GAIN = (0.25, 1.75)
#: What g of a matrix may lie beyond its range, and standard deviations of chance beside it.
_BIAS, _DEVIATIONS = 0.003, 4.0
#: Weights of a block whose squares sum to less are zeros.
_TINY = 1e-30


def find_strangers(folder: Path, sources: Mapping[str, Rows]) -> list[str]:
    """Matrices that are no rounding of the checkpoint's, a sentence each.

    Args:
        sources: What each is made of, by the name of its initializer before quantization.

    Raises:
        ParityError: A weight is missing, has another shape, or lies beyond the end of its file.
    """
    stored = read_stored(folder, sources)
    return [
        f"{name} {why}"
        for name in stored
        if (why := describe_stranger(sources[name], stored[name])) is not None
    ]


def describe_stranger(rows: Rows, stored: Stored) -> str | None:
    """Say why `stored` cannot be a rounding of `rows`; None if it can."""
    cross = signal = noise = 0.0
    count = 0
    for start, stop in row_chunks(rows):
        wanted = np.atleast_1d(rows.rows(start, stop).astype(np.float32))
        actual = stored.read(start, stop)
        if not np.isfinite(actual).all():
            return f"has values that are not finite in rows {start} to {stop}"
        for row, block, gain in _outliers(wanted, actual, stored.block):
            return f"has a gain of {gain:.2f} in block {block} of row {start + row}, a rounding has 1"
        cross += float(np.sum(wanted * actual, dtype=np.float64))
        signal += float(np.sum(wanted * wanted, dtype=np.float64))
        noise += float(np.sum((wanted - actual) ** 2, dtype=np.float64))
        count += wanted.size
    if signal < _TINY:
        return None if noise < _TINY else "is not zero as the checkpoint's is"
    gain, lost = cross / signal, noise / signal
    chance = _BIAS + _DEVIATIONS * math.sqrt(lost / count)
    if 1 - lost - chance <= gain <= 1 + chance:
        return None
    return f"has a gain of {gain:.4f}, a rounding that loses {lost:.4f} has {1 - lost:.4f} to 1"


def _outliers(wanted: Array, actual: Array, block: int) -> Iterator[tuple[int, int, float]]:
    """Row, block and gain of blocks whose gain is that of no rounding."""
    wide = [a.reshape(-1, a.shape[-1]) for a in (wanted * actual, wanted * wanted)]
    starts = np.arange(0, wide[0].shape[1], block)
    cross, signal = (np.add.reduceat(a, starts, axis=1) for a in wide)
    gain = np.divide(cross, signal, out=np.ones_like(cross), where=signal > _TINY)
    low, high = _BLOCK_GAIN
    for row, index in np.argwhere((gain < low) | (gain > high)):
        yield int(row), int(index), float(gain[row, index])
