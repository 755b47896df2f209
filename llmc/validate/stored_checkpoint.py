"""Read the tensors of a checkpoint artifact as the graph has them, by llmc's own reader of checkpoints."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.errors import CheckpointError, ParityError
from llmc.graph.weights import (
    CastRows,
    CodeGrid,
    ConcatRows,
    Rows,
    ScaledRows,
    StackGrid,
    StoredRows,
    WeightStore,
)
from llmc.validate.stored import BLOCK, Stored


def rows_of_store(store: WeightStore, expected: Mapping[str, Rows]) -> dict[str, Stored]:
    """Return every tensor of `expected` with the values that the artifact has for its parameters.

    The files hold channels as they were scaled, so that no scaling is applied to what is read.

    Args:
        store: The artifact's tensors as floats, by parameter.
        expected: The rows that each weight of the graph is computed from.

    Raises:
        ParityError: A parameter is missing, or has another shape.
    """
    return {name: _stored(name, rows, store) for name, rows in expected.items()}


def _stored(name: str, rows: Rows, store: WeightStore) -> Stored:
    own = _of(name, rows, store)
    grid = _grid(own)
    return Stored(
        rows.shape,
        _reader(lambda start, stop: np.atleast_1d(own.rows(start, stop)).astype(np.float32)),
        BLOCK if grid is None or grid.group_size == rows.shape[-1] else grid.group_size,
        None if grid is None or not grid.even else _reader(_steps(grid, rows.shape)),
    )


def _of(name: str, rows: Rows, store: WeightStore) -> Any:
    """Return the same rows of another store, in the types of its files and with its own scales of channels.

    Raises:
        ParityError: A parameter is missing, or has another shape.
    """
    match rows:
        case StoredRows():
            info = store.infos().get(rows.info.name)
            if info is None:
                raise ParityError(f"the artifact has no tensors of {rows.info.name}")
            if info.shape != rows.shape:
                raise ParityError(f"weight {name} has shape {info.shape}, the original's {rows.shape}")
            return StoredRows(store, info)
        case CastRows() | ScaledRows():
            return _of(name, rows.inner, store)
        case ConcatRows():
            return replace(rows, parts=tuple(_of(name, part, store) for part in rows.parts))
    arranged: Any = rows
    return replace(arranged, inner=_of(name, arranged.inner, store))


def _grid(rows: Any) -> CodeGrid | None:
    """Return the codes of a matrix that the artifact stores as codes, in its own arrangement."""
    if not isinstance(rows, StoredRows) or rows.info.codes is None:
        return None
    with _reading():
        grid = rows.info.codes()
    if not isinstance(grid, CodeGrid) or grid.turned:
        return None
    return grid if len(rows.shape) == 2 or isinstance(grid, StackGrid) else None


def _steps(grid: CodeGrid, shape: tuple[int, ...]) -> Callable[[int, int], Array]:
    each = grid.outputs if isinstance(grid, StackGrid) else 1  # rows of codes for a row of the tensor

    def steps(start: int, stop: int) -> Array:
        scales = grid.read(each * start, each * stop).scales.astype(np.float32)
        wide = np.repeat(scales, grid.group_size, axis=1)[:, : shape[-1]]
        return wide.reshape(stop - start, *shape[1:])

    return steps


def _reader(read: Callable[[int, int], Array]) -> Callable[[int, int], Array]:
    def checked(start: int, stop: int) -> Array:
        with _reading():
            return read(start, stop)

    return checked


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise ParityError(f"the artifact's weights cannot be read: {error.fact}") from error
