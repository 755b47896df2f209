"""Read rows of a tensor from a byte range of a file, or from a value that can only be computed whole."""

import math
import threading
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np

from llmc.arrays import Array
from llmc.errors import CheckpointError


def row_range(shape: tuple[int, ...], start: int, stop: int | None) -> tuple[int, int]:
    """Resolve `start:stop` along axis 0 as Python slices do; a scalar counts as one row."""
    low, high, _ = slice(start, stop).indices(shape[0] if shape else 1)
    return low, max(low, high)


def read_range(
    file: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...], start: int, stop: int | None
) -> Array:
    """Read rows start:stop of a row-major tensor at byte `offset`, (stop - start, *shape[1:]); or a scalar.

    Raises:
        CheckpointError: The file ends early, because it changed since it was opened.
    """
    low, high = row_range(shape, start, stop)
    out = np.empty((high - low, *shape[1:]) if shape else (), dtype)
    view = out.reshape(-1).view(np.uint8).data
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset + low * math.prod(shape[1:]) * dtype.itemsize)
        while view:
            count = stream.readinto(view)
            if not count:
                raise CheckpointError(f"{file} ends at byte {stream.tell()}; it changed since it was opened")
            view = view[count:]
    return out


class WholeValues(threading.local):
    """Serves ranges of rows of tensors that can only be computed whole.

    Each thread keeps the last tensor that was read in part until its last row has been read; a loop over the
    rows therefore computes it once, and nothing is kept afterwards.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._value: Array | None = None

    def rows(self, key: Hashable, compute: Callable[[], Array], start: int, stop: int | None) -> Array:
        """Return rows start:stop of `compute()`, which `key` identifies."""
        if start == 0 and stop is None:
            return compute()
        value = self._value if self._key == key else None
        if value is None:
            value = compute()
        low, high = row_range(value.shape, start, stop)
        done = high == value.shape[0]
        self._key, self._value = (None, None) if done else (key, value)
        return value[low:high] if done else value[low:high].copy()
