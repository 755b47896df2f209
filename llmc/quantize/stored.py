"""Store matrices that a checkpoint has already quantized: their codes, unchanged, in an operator's blocks.

The values stay the same whatever the layout: a group of inputs may be cut into several blocks with its scale
and zero point, codes and zero points may be shifted together into a wider type, and matrices that are joined
along their outputs may be converted to the finest blocks and the widest codes among them. If a part has
minimums instead of zero points, codes stay and every zero point becomes a float, -minimum / scale.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from llmc.arrays import Array
from llmc.config import WeightScheme
from llmc.errors import CheckpointError
from llmc.graph.weights import (
    CastRows,
    CodeGrid,
    CodeRows,
    ConcatRows,
    ExpertRows,
    Rows,
    ScaledRows,
    StoredRows,
    TransposedRows,
)
from llmc.quantize.blocks import PackedBlocks, ScaleType, count_blocks, pack
from llmc.quantize.place import QuantizedTensor

#: Block sizes that operators accept, largest first.
_BLOCK_SIZES = (128, 64, 32, 16)
#: Number of codes that are unpacked at a time.
_STEP = 1 << 22
#: How a checkpoint's codes were handled.
KEPT = "kept"
MADE_FLOATS = "made floats"


@dataclass(frozen=True)
class StoredMatrix:
    """The matrix (N, K) whose codes can be stored unchanged.

    Args:
        parts: Codes and number of outputs of each joined part.
        scheme: Bits, block size and symmetry that fit all of them.
    """

    parts: tuple[tuple[CodeGrid, int], ...]
    in_features: int
    scheme: WeightScheme

    def pack(self, scale_type: ScaleType, name: str) -> PackedBlocks:
        """Return the matrix as operators read it.

        Raises:
            CheckpointError: A scale is not finite, or does not fit `scale_type`.
        """
        scheme = self.scheme
        blocks = count_blocks(self.in_features, scheme.block_size)
        outputs = sum(count for _, count in self.parts)
        codes = np.empty((outputs, blocks, scheme.block_size * scheme.bits // 8), np.uint8)
        scales = np.empty((outputs, blocks), scale_type)
        zeros = np.empty((outputs, blocks), np.float32 if self.float_zeros else np.uint8)
        step = max(8, _STEP // self.in_features // 8 * 8)
        row = 0
        for grid, count in self.parts:
            for start in range(0, count, step):
                stop = min(start + step, count)
                here = slice(row + start, row + stop)
                wide, zeros[here], scales[here] = self._blocks(grid, grid.read(start, stop), scale_type)
                codes[here] = pack(wide.reshape(stop - start, blocks, -1), scheme.bits)
            row += count
        if not (np.isfinite(scales).all() and np.isfinite(zeros).all()):
            raise CheckpointError(
                f"{name} has scales that are not finite, or too large for {np.dtype(scale_type)}",
                hint="the checkpoint is damaged, or needs float32 on this target",
            )
        if self.float_zeros:
            return PackedBlocks(codes, scales, zeros, self.in_features, scheme)
        packed = None if scheme.symmetric else pack(zeros, scheme.bits)
        return PackedBlocks(codes, scales, packed, self.in_features, scheme)

    @property
    def float_zeros(self) -> bool:
        """Whether zero points are floats, because some part has minimums."""
        return any(grid.minimums for grid, _ in self.parts)

    def has_grid_of(self, scheme: WeightScheme) -> bool:
        """Return whether the codes have the bits, blocks and symmetry of `scheme`, without minimums."""
        sizes = {min(grid.group_size, self.in_features) for grid, _ in self.parts}
        own = self.scheme
        return (
            not self.float_zeros
            and sizes == {scheme.block_size}
            and (own.bits, own.block_size, own.symmetric)
            == (scheme.bits, scheme.block_size, scheme.symmetric)
        )

    @property
    def code_bits(self) -> int | None:
        """The bits that codes with float zero points need, if they are stored in more."""
        bits = max(grid.bits for grid, _ in self.parts)
        return bits if self.float_zeros and bits < self.scheme.bits else None

    def _blocks(self, grid: CodeGrid, rows: CodeRows, scale_type: ScaleType) -> tuple[Array, Array, Array]:
        """Return codes uint8 (n, padded inputs), zero points and scales (n, blocks) of outputs of a part."""
        scheme = self.scheme
        blocks = count_blocks(self.in_features, scheme.block_size)
        group = np.arange(blocks) * scheme.block_size // grid.group_size
        with np.errstate(over="ignore"):
            scales: Array = rows.scales[:, group].astype(scale_type)
        zeros: Array
        flat = np.zeros(scales.shape, bool)
        if rows.minimums is not None:
            minimums = rows.minimums[:, group].astype(np.float32)
            flat = scales == 0
            with np.errstate(over="ignore"):
                scales[flat] = minimums[flat].astype(scale_type)
            zeros = -minimums / np.where(scales == 0, scale_type(1), scales).astype(np.float32)
            zeros[flat] = -1  # (0 + 1) * minimum
        elif self.float_zeros:
            zeros = rows.zero_points[:, group].astype(np.float32)
        else:
            lift = np.uint8((1 << (scheme.bits - 1)) - (1 << (grid.bits - 1)))
            zeros = rows.zero_points[:, group] + lift
        wide = np.zeros((len(zeros), blocks * scheme.block_size), np.uint8)
        wide[:, : self.in_features] = rows.codes
        if not self.float_zeros:
            wide[:, : self.in_features] += lift
            # Padded inputs have the code of 0; with float zero points their activations are 0.
            wide[:, self.in_features :] = np.repeat(zeros, scheme.block_size, axis=1)[:, self.in_features :]
        elif flat.any():
            wide[np.repeat(flat, scheme.block_size, axis=1)] = 0
        return wide, zeros, scales

    def storage_type(self, wanted: ScaleType) -> ScaleType:
        """Return the type of stored scales: float16 if it represents them or if compact; else `wanted`."""
        narrow = all(grid.compact or np.can_cast(grid.scale_dtype, np.float16) for grid, _ in self.parts)
        return np.float16 if narrow else wanted

    def is_exact(self, scale_type: ScaleType) -> bool:
        """Return whether `scale_type` represents all numbers of the scales' type."""
        return all(np.can_cast(grid.scale_dtype, scale_type) for grid, _ in self.parts)


def find_stored(rows: Rows, scheme: WeightScheme, *, outputs_first: bool) -> StoredMatrix | str | None:
    """Find the checkpoint's codes of a matrix, in blocks of their own; or why they cannot be kept.

    Args:
        scheme: The rules' scheme, for everything that the codes do not decide.

    Returns:
        None if the checkpoint stores all of it as floats.
    """
    if not is_stored(rows):
        return None
    while isinstance(rows, CastRows | TransposedRows):
        outputs_first ^= isinstance(rows, TransposedRows)
        rows = rows.inner
    parts = []
    for part in _joined(rows):
        if not isinstance(part, StoredRows):
            return "its values are scaled or turned before they are stored"
        if part.info.codes is None:
            return f"{part.info.name}, which is joined with it, is not quantized"
        grid = part.info.codes()
        if isinstance(grid, str):
            return grid
        if grid.turned is outputs_first or (grid.turned and part is not rows):
            return "its inputs come first"
        parts.append((grid, part.shape[0] if outputs_first else part.shape[1]))
    in_features = rows.shape[1] if outputs_first else rows.shape[0]
    grids = [grid for grid, _ in parts]
    sizes = [grid.group_size for grid in grids if grid.group_size < in_features]
    # One scale for all inputs fits every block size; one that needs no padding is best.
    fitting = [b for b in _BLOCK_SIZES if all(size % b == 0 for size in sizes)]
    if not fitting:
        return f"groups of {min(sizes)} inputs are not a multiple of {_BLOCK_SIZES[-1]}"
    block = next((b for b in fitting if in_features % b == 0), fitting[-1])
    if in_features % block and any(grid.minimums for grid in grids):
        return f"{in_features} inputs with minimums do not fill a whole number of blocks"
    shared = scheme.model_copy(
        update={
            "bits": 4 if all(grid.bits <= 4 for grid in grids) else 8,
            "block_size": block,
            "symmetric": all(grid.symmetric for grid in grids),
        }
    )
    return StoredMatrix(tuple(parts), in_features, shared)


def is_stored(rows: Rows) -> bool:
    """Return whether the checkpoint stores some of `rows` quantized."""
    match rows:
        case StoredRows():
            return rows.info.codes is not None
        case ConcatRows():
            return any(is_stored(part) for part in rows.parts)
        case CastRows() | TransposedRows() | ExpertRows() | ScaledRows():
            return is_stored(rows.inner)
    return False


def origin_notes(tensors: Iterable[QuantizedTensor]) -> Iterator[str]:
    """Describe each way in which the checkpoint's codes were handled, a line each."""
    by_origin: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.origin is not None:
            by_origin.setdefault(tensor.origin, []).append(tensor.name)
    for origin, names in by_origin.items():
        yield f"codes of the checkpoint: {origin} for {len(names)} matrices, first {names[0]}"


def _joined(rows: Rows) -> Iterator[Rows]:
    """Yield the parts that are joined along the outputs, in order."""
    match rows:
        case ConcatRows():
            for part in rows.parts:
                yield from _joined(part)
        case CastRows():
            yield from _joined(rows.inner)
        case _:
            yield rows
