"""Refuse weights that are NaN or infinite when rows are first read."""

import ml_dtypes
import numpy as np

from llmc.arrays import Array
from llmc.errors import CheckpointError

#: Integer types of the same size, and the bit pattern of infinity, or of the only NaN: integers compare
#: faster than floats.
_BITS = {
    np.dtype(np.float32): (np.int32, np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.int16, np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.int16, np.uint16, 0x7F80),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.int8, np.uint8, 0x7F),
}


class FiniteCheck:
    """Checks rows when they are first read, and skips rows that were checked before.

    A race between threads only causes a second check of the same rows.
    """

    def __init__(self) -> None:
        self._checked: dict[str, int] = {}  # number of leading rows known to be finite

    def check(self, name: str, start: int, rows: Array) -> Array:
        """Check `rows`, which begin at row `start` of the tensor `name`, and return them.

        Raises:
            CheckpointError: A value is NaN or infinite.
        """
        stop = start + (len(rows) if rows.ndim else 1)
        checked = self._checked.get(name, 0)
        if stop > checked:
            if not is_finite(rows):
                raise _refusal(name, start, rows)
            if start <= checked:
                self._checked[name] = stop
        return rows


def is_finite(values: Array) -> bool:
    """Return whether no value is NaN or infinite; integers are always finite."""
    if not values.size or values.dtype.kind in "iub":
        return True
    if values.dtype not in _BITS:
        return bool(np.isfinite(values).all())
    signed, unsigned, infinity = _BITS[values.dtype]
    bits = np.ascontiguousarray(values).view(signed)
    sign = 1 << (8 * values.dtype.itemsize - 1)  # negative floats are the largest unsigned integers
    return int(bits.max()) < infinity and int(bits.view(unsigned).max()) < sign | infinity


def _refusal(name: str, start: int, rows: Array) -> CheckpointError:
    bad = ~np.isfinite(rows.astype(np.float32))
    place = f" in row {start + int(np.argwhere(bad)[0][0])}" if rows.ndim else ""
    return CheckpointError(
        f"{name} in the files holds NaN or infinity{place}",
        hint="download the weights again; if that does not help, the model was saved after it broke",
    )
