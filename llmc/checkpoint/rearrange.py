"""Carry over the codes of tensors whose rows a transformers converter only reorders.

To find what a converter does, it is given tensors whose every element encodes its position. Blocks lie along
the columns, so codes can be carried over if whole rows are reordered, or the whole matrix is transposed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.arrays import Array
from llmc.graph.weights import CodeGrid, CodeRows, TensorInfo

#: Columns of a probe: enough to see whether they keep their positions.
_WIDTH = 2
#: Elements of the largest probe of full width.
_MOST_ELEMENTS = 1 << 25


@dataclass(frozen=True, eq=False)
class Arrangement:
    """The source rows that a tensor consists of.

    Args:
        rows: int64 (rows of the tensor,), indices into the sources' rows, one source after the other.
        turned: Whether the tensor is the matrix of these rows transposed.
    """

    rows: Array
    turned: bool


def probe_shapes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield probe shapes for a tensor of `shape`: a narrow one, then the full one if it is not too large."""
    if len(shape) != 2:
        yield (*shape[:1], *((1,) * (len(shape) - 1)))
        return
    yield shape[0], _WIDTH
    if math.prod(shape) <= _MOST_ELEMENTS:
        yield shape


def probe(shape: tuple[int, ...], first: int = 0) -> Array:
    """Return a tensor whose elements count up from `first`, float64."""
    return np.arange(first, first + math.prod(shape), dtype=np.float64).reshape(shape)


def find_arrangement(values: Array, width: int) -> Arrangement | None:
    """Return how `values` consists of rows of probes of `width` columns; None if it does not."""
    if values.ndim != 2:
        return None
    for turned, matrix in ((False, values), (True, values.T)):
        if matrix.shape[1] != width:
            continue
        rows = np.floor(matrix[:, 0] / width)
        if np.array_equal(matrix, rows[:, None] * width + np.arange(width)):
            return Arrangement(rows.astype(np.int64), turned)
    return None


def rearrange(
    sources: Sequence[TensorInfo], arrangement: Arrangement | None
) -> Callable[[], CodeGrid | str] | None:
    """Return the value of `TensorInfo.codes` for a tensor that is made from `sources`."""
    if all(info.codes is None for info in sources):
        return None
    if arrangement is None:
        return lambda: "its inputs are rearranged"

    def codes() -> CodeGrid | str:
        grids: list[tuple[CodeGrid, int]] = []
        for info in sources:
            grid = None if info.codes is None else info.codes()
            if not isinstance(grid, CodeGrid):
                return grid or f"{info.name}, which it is joined with, is not quantized"
            grids.append((grid, info.shape[0]))
        return _gather(grids, arrangement)

    return codes


def _gather(grids: Sequence[tuple[CodeGrid, int]], arrangement: Arrangement) -> CodeGrid | str:
    first = grids[0][0]
    forms = {(g.bits, g.group_size, g.minimums, g.scale_dtype, g.turned) for g, _ in grids}
    if len(forms) > 1 or (first.turned and not arrangement.turned):
        return "its parts are quantized differently"
    ends = np.cumsum([count for _, count in grids])

    def read(start: int, stop: int) -> CodeRows:
        rows = arrangement.rows[start:stop]
        owners = np.searchsorted(ends, rows, side="right")
        parts = [
            (owners == index, _read_rows(grid, rows[owners == index] - (end - count)))
            for index, ((grid, count), end) in enumerate(zip(grids, ends, strict=True))
            if (owners == index).any()
        ]
        return _merge(parts, len(rows))

    return CodeGrid(
        first.bits,
        first.group_size,
        all(grid.symmetric for grid, _ in grids),
        first.scale_dtype,
        read,
        minimums=first.minimums,
        compact=any(grid.compact for grid, _ in grids),
        turned=arrangement.turned,
    )


def _read_rows(grid: CodeGrid, rows: Array) -> CodeRows:
    """Read arbitrary rows of a grid by reading the range that contains them."""
    low, high = int(rows.min()), int(rows.max()) + 1
    codes, zero_points, scales, minimums = grid.read(low, high)
    at = rows - low
    return CodeRows(codes[at], zero_points[at], scales[at], None if minimums is None else minimums[at])


def _merge(masked: Sequence[tuple[Array, CodeRows]], count: int) -> CodeRows:
    """Merge rows of several grids; a mask gives the positions of each."""
    if len(masked) == 1:
        return masked[0][1]
    merged: list[Array | None] = []
    for parts in zip(*(rows for _, rows in masked), strict=True):
        if parts[0] is None:
            merged.append(None)
            continue
        whole = np.empty((count, *parts[0].shape[1:]), parts[0].dtype)
        for (mask, _), part in zip(masked, parts, strict=True):
            whole[mask] = part
        merged.append(whole)
    codes, zero_points, scales, minimums = merged
    if codes is None or zero_points is None or scales is None:
        raise ValueError("rows without codes cannot be merged")
    return CodeRows(codes, zero_points, scales, minimums)
