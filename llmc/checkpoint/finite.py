"""Weights must be numbers: NaN and infinity are refused where rows are first read."""

import ml_dtypes
import numpy as np

from llmc.arrays import Array
from llmc.errors import CheckpointError

#: Integers of the same size, and the bits of infinity, or of the only NaN: integers compare faster.
_BITS = {
    np.dtype(np.float32): (np.int32, np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.int16, np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.int16, np.uint16, 0x7F80),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.int8, np.uint8, 0x7F),
}


class FiniteCheck:
    """Checks rows as they are read, those that were checked before not again.

    A race between threads costs a second check of the same rows, and nothing else.
    """

    def __init__(self) -> None:
        self._checked: dict[str, int] = {}  # rows from the first that are known to be finite

    def check(self, name: str, start: int, rows: Array) -> Array:
        """`rows`, which begin at row `start` of the tensor `name`.

        Raises:
            CheckpointError: A value is NaN or infinite.
        """
        stop = start + (len(rows) if rows.ndim else 1)
        known = self._checked.get(name, 0)
        if stop > known:
            if not is_finite(rows):
                raise _refusal(name, start, rows)
            if start <= known:
                self._checked[name] = stop
        return rows


def is_finite(values: Array) -> bool:
    """Whether no value is NaN or infinite; integers are finite."""
    if not values.size or values.dtype.kind in "iub":
        return True
    if values.dtype not in _BITS:
        return bool(np.isfinite(values).all())
    signed, unsigned, infinity = _BITS[values.dtype]
    bits = np.ascontiguousarray(values).view(signed)
    sign = 1 << (8 * values.dtype.itemsize - 1)  # the largest unsigned integers are those of negative floats
    return int(bits.max()) < infinity and int(bits.view(unsigned).max()) < sign | infinity


def _refusal(name: str, start: int, rows: Array) -> CheckpointError:
    bad = ~np.isfinite(rows.astype(np.float32))
    place = f" in row {start + int(np.argwhere(bad)[0][0])}" if rows.ndim else ""
    return CheckpointError(
        f"{name} of the files holds NaN or infinity{place}",
        hint="download the weights again; if that does not help, the model was saved after it broke",
    )
