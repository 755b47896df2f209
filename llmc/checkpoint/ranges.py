"""Rows of a tensor: from a range of bytes of a file, or from a value that can only be had whole."""

import math
import threading
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np

from llmc.arrays import Array
from llmc.errors import CheckpointError


def row_range(shape: tuple[int, ...], start: int, stop: int | None) -> tuple[int, int]:
    """`start:stop` along axis 0 as Python slices it; a scalar counts as one row."""
    low, high, _ = slice(start, stop).indices(shape[0] if shape else 1)
    return low, max(low, high)


def read_range(
    file: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...], start: int, stop: int | None
) -> Array:
    """Rows start:stop of the row-major tensor at byte `offset`, (stop - start, *shape[1:]); a scalar whole.

    Raises:
        CheckpointError: The file ends early, that is: it changed since it was opened.
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
    """Rows of tensors that are only computed whole, asked for range by range.

    Each thread keeps the last tensor it was asked a part of, until the part that reaches its end; so
    a walk over the rows computes it once, and nothing stays behind.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._value: Array | None = None

    def rows(self, key: Hashable, compute: Callable[[], Array], start: int, stop: int | None) -> Array:
        """Rows start:stop of `compute()`, which `key` identifies."""
        if start == 0 and stop is None:
            return compute()
        value = self._value if self._key == key else None
        if value is None:
            value = compute()
        low, high = row_range(value.shape, start, stop)
        done = high == value.shape[0]
        self._key, self._value = (None, None) if done else (key, value)
        return value[low:high] if done else value[low:high].copy()
