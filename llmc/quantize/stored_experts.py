"""Store stacked experts that a checkpoint has already quantized: their codes, unchanged, in QMoE's blocks."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmc.arrays import Array
from llmc.config import WeightScheme
from llmc.graph.weights import CastRows, CodeGrid, CodeRows, ExpertRows, Rows, StackGrid, StoredRows
from llmc.quantize.stored import StoredMatrix, is_stored


def find_stored_experts(
    stacks: Sequence[Rows], scheme: WeightScheme, sizes: Sequence[int]
) -> tuple[StoredMatrix, ...] | str | None:
    """Find the checkpoint's codes of the stacks of one QMoE, in blocks that all of them have; or why not.

    Args:
        stacks: The stacked matrices, (experts, N, K) each.
        scheme: The rules' scheme, for everything that the codes do not decide.
        sizes: Block sizes that divide the inputs of every stack, largest first.

    Returns:
        None if the checkpoint stores all of them as floats.
    """
    if not any(is_stored(rows) for rows in stacks):
        return None
    grids = []
    for rows in stacks:
        grid = _grid_of(rows)
        if isinstance(grid, str):
            return grid
        grids.append(grid)
    groups = [g.group_size for g, rows in zip(grids, stacks, strict=True) if g.group_size < rows.shape[2]]
    size = next((size for size in sizes if not any(group % size for group in groups)), None)
    if size is None:
        return f"groups of {min(groups)} inputs do not fit blocks that all matrices of QMoE have"
    shared = scheme.model_copy(
        update={
            "bits": 4 if all(grid.bits <= 4 for grid in grids) else 8,
            "block_size": size,
            "symmetric": all(grid.symmetric for grid in grids),
        }
    )
    return tuple(
        StoredMatrix(((grid, rows.shape[0] * rows.shape[1]),), rows.shape[2], shared)
        for grid, rows in zip(grids, stacks, strict=True)
    )


def _grid_of(rows: Rows) -> CodeGrid | str:
    """Return the codes of a stack in the order of its outputs."""
    transposed = interleave = False
    while isinstance(rows, CastRows | ExpertRows):
        if isinstance(rows, ExpertRows):
            if rows.doubled:
                return "its outputs are stored twice, as gate and up"
            transposed ^= rows.transposed
            interleave ^= rows.interleave
        rows = rows.inner
    if not isinstance(rows, StoredRows):
        return "its values are scaled or turned before they are stored"
    if rows.info.codes is None:
        return f"{rows.info.name} is not quantized"
    grid = rows.info.codes()
    if isinstance(grid, str):
        return grid
    if not isinstance(grid, StackGrid):
        return "its codes are not read by expert"
    if grid.turned is not transposed:
        return "its inputs come first"
    return _interleaved(grid) if interleave else grid


def _interleaved(grid: StackGrid) -> CodeGrid:
    """Return the same codes with the second half of each expert's outputs interleaved with the first."""
    size = grid.outputs

    def read_expert(expert: int, start: int, stop: int) -> CodeRows:
        """Read outputs start:stop of one expert as a range of each half."""
        first, last = start // 2, -(-stop // 2)
        base = expert * size
        one = grid.read(base + first, base + last)
        two = grid.read(base + size // 2 + first, base + size // 2 + last)
        here = slice(start % 2, start % 2 + stop - start)
        return CodeRows(
            _weave(one.codes, two.codes)[here],
            _weave(one.zero_points, two.zero_points)[here],
            _weave(one.scales, two.scales)[here],
        )

    def read(start: int, stop: int) -> CodeRows:
        parts = [
            read_expert(expert, max(start - expert * size, 0), min(stop - expert * size, size))
            for expert in range(start // size, -(-stop // size))
        ]
        codes, zero_points, scales = zip(*(part[:3] for part in parts), strict=True)
        return CodeRows(np.concatenate(codes), np.concatenate(zero_points), np.concatenate(scales))

    return replace(grid, read=read)


def _weave(one: Array, two: Array) -> Array:
    return np.stack([one, two], axis=1).reshape(-1, *one.shape[1:])
