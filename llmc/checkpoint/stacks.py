"""Provide the codes of experts that the files store separately and the model stacks."""

from collections.abc import Callable, Sequence

import numpy as np

from llmc.arrays import Array
from llmc.graph.weights import CodeGrid, CodeRows, StackGrid, TensorInfo, WeightStore


def stack_codes(
    raw: WeightStore, patterns: Sequence[Sequence[str]], shape: tuple[int, ...], read: Callable[[], Array]
) -> Callable[[], CodeGrid | str]:
    """Return the value of `TensorInfo.codes` for a stack whose experts are joined along their outputs.

    Args:
        patterns: Names of the matrices of each part of an expert (gate, up), one name per expert.
        shape: Shape of the stack.
        read: Reads the first expert of the stack, (1, N, K), which its codes must reproduce.
    """
    experts = [[raw.infos()[name] for name in names] for names in zip(*patterns, strict=True)]

    def codes() -> CodeGrid | str:
        grids = []
        for expert in experts:
            for info in expert:
                grid = _grid_of(info)
                if isinstance(grid, str):
                    return grid
                grids.append((grid, info.shape[0]))
        first = grids[0][0]
        if len({(g.bits, g.group_size, g.scale_dtype) for g, _ in grids}) > 1:
            return "its experts are quantized differently"
        if any(grid.minimums or grid.turned for grid, _ in grids):
            return "its experts have zero points that are not integers"
        outputs = sum(info.shape[0] for info in experts[0])
        symmetric = all(grid.symmetric for grid, _ in grids)
        stack = StackGrid(
            first.bits,
            first.group_size,
            symmetric,
            first.scale_dtype,
            _reader(grids),
            outputs=outputs,
        )
        if shape[1:] != (outputs, experts[0][0].shape[1]) or not np.array_equal(_values(stack), read()[0]):
            return "its experts are rearranged"
        return stack

    return codes


def _grid_of(info: TensorInfo) -> CodeGrid | str:
    return f"{info.name}, which is stacked with it, is not quantized" if info.codes is None else info.codes()


def _reader(grids: Sequence[tuple[CodeGrid, int]]) -> Callable[[int, int], CodeRows]:
    ends = np.cumsum([count for _, count in grids])

    def read(start: int, stop: int) -> CodeRows:
        first, last = (int(i) for i in np.searchsorted(ends, (start, stop - 1), side="right"))
        parts = []
        for (grid, count), end in zip(grids[first : last + 1], ends[first : last + 1], strict=True):
            begin = int(end) - count
            parts.append(grid.read(max(start - begin, 0), min(stop - begin, count)))
        codes, zero_points, scales = zip(*(part[:3] for part in parts), strict=True)
        return CodeRows(np.concatenate(codes), np.concatenate(zero_points), np.concatenate(scales))

    return read


def _values(stack: StackGrid) -> Array:
    """Dequantize the first expert, float32 (N, K)."""
    rows = stack.read(0, stack.outputs)
    group = np.arange(rows.codes.shape[1]) // stack.group_size
    values: Array = rows.codes.astype(np.float32)
    values -= rows.zero_points.astype(np.float32)[:, group]
    values *= rows.scales.astype(np.float32)[:, group]
    return values
