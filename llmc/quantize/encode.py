"""Encode weights as packed codes, in steps that fit in the cache."""

import numpy as np

from llmc.arrays import Array
from llmc.config import WeightScheme
from llmc.errors import CheckpointError
from llmc.quantize.blocks import (
    STEP,
    PackedBlocks,
    ScaleType,
    Workspace,
    count_blocks,
    invert,
    pack,
    round_to_levels,
    zero_level,
)
from llmc.quantize.methods import find_handler

#: A type for the elements that are moved at once, by their bytes.
_UNITS = {n: np.dtype(kind) for n, kind in ((1, "u1"), (2, "u2"), (4, "u4"), (8, "u8"), (16, "c16"))}


class Encoder:
    """The encoder of one quantized matrix (N, K), which it fills in parts; parts may run in several threads.

    Args:
        name: Name of the matrix in errors.
        out_features: N.
        in_features: K.
        scheme: The scheme of the codes.
        scale_type: Type of the stored scales.
        importance: Weight of the square of an error, by input feature, float32 (K,).
    """

    def __init__(
        self,
        name: str,
        out_features: int,
        in_features: int,
        scheme: WeightScheme,
        scale_type: ScaleType,
        importance: Array | None = None,
    ) -> None:
        self.name = name
        self.scheme = scheme
        self.in_features = in_features
        self._handler = find_handler(scheme)
        self._scale_type = scale_type
        blocks = count_blocks(in_features, scheme.block_size)
        self._codes = np.empty((out_features, blocks, scheme.block_size * scheme.bits // 8), np.uint8)
        self._scales = np.empty((out_features, blocks), scale_type)
        self._zeros = None if scheme.symmetric else np.empty((out_features, blocks), np.uint8)
        self._importance: Array | None = None
        if importance is not None:
            padded = np.zeros(blocks * scheme.block_size, np.float32)
            padded[:in_features] = importance
            self._importance = padded.reshape(blocks, -1).T

    def encode_rows(self, start: int, weights: Array) -> None:
        """Store outputs start:start+n from weights (n, K) of any floating type."""
        blocks = self._scales.shape[1]
        size = self.scheme.block_size
        padded = blocks * size
        lanes = self._lanes(weights.dtype)
        step = max(1, (STEP if lanes == 1 else 2 * STEP) // padded)  # one buffer instead of three
        most = min(step, len(weights))
        important = None if self._importance is None else np.tile(self._importance, (1, most))
        work = Workspace(size, most * blocks, important, lanes=lanes)
        unit = _UNITS[lanes * weights.dtype.itemsize]
        turned = np.empty((size // lanes, most * blocks), unit)
        buffer = None if padded == self.in_features else np.zeros((most, padded), weights.dtype)
        for first in range(0, len(weights), step):
            part = np.ascontiguousarray(weights[first : first + step])
            rows = len(part)
            if buffer is not None:
                buffer[:rows, : self.in_features] = part
                part = buffer[:rows]
            part_work, part_turned = work.narrow(rows * blocks), turned[:, : rows * blocks]
            np.copyto(part_turned, part.reshape(-1, size).view(unit).T)
            np.copyto(part_work.columns, part_turned.view(weights.dtype))
            codes, scale, zero = self._encode(part_work, f"outputs {start + first}:{start + first + rows}")
            here = slice(start + first, start + first + rows)
            stored = self._codes[here].reshape(rows * blocks, -1)
            bytes_of_unit = codes.shape[1] // (rows * blocks)
            stored.view(_UNITS[bytes_of_unit])[:] = codes.view(_UNITS[bytes_of_unit]).T
            self._scales[here].reshape(-1)[:] = scale
            if self._zeros is not None:
                self._zeros[here].reshape(-1)[:] = zero

    def encode_inputs(self, block: int, weights: Array) -> None:
        """Store one block of every output from weights (n, N) of any floating type, n <= block_size."""
        size = self.scheme.block_size
        outputs = weights.shape[1]
        step = max(1, STEP // size)
        most = min(step, outputs)
        important = None if self._importance is None else np.repeat(self._importance[:, [block]], most, 1)
        work = Workspace(size, most, important)
        for first in range(0, outputs, step):
            here = slice(first, min(first + step, outputs))
            part_work = work.narrow(here.stop - here.start)
            part_work.columns[: len(weights)] = weights[:, here]
            part_work.columns[len(weights) :] = 0
            where = f"inputs {block * size}:{block * size + len(weights)}"
            codes, scale, zero = self._encode(part_work, where)
            self._codes[here, block] = codes.T
            self._scales[here, block] = scale
            if self._zeros is not None:
                self._zeros[here, block] = zero

    def finish(self) -> PackedBlocks:
        """Return the whole matrix, once every part is stored."""
        zeros = None if self._zeros is None else pack(self._zeros, self.scheme.bits)
        return PackedBlocks(self._codes, self._scales, zeros, self.in_features, self.scheme)

    def _lanes(self, dtype: np.dtype) -> int:
        """Return the number of columns of a block: elements of 16 bytes, if the method allows."""
        if not self._handler.only_extremes or self._importance is not None:
            return 1
        return min(16 // dtype.itemsize, self.scheme.block_size)

    def _encode(self, work: Workspace, where: str) -> tuple[Array, Array, Array]:
        """Return packed codes, scales and zero points of `work.columns`.

        Returns:
            Codes uint8 (units, n * bytes), units of adjacent codes of each block; with one lane, (bytes of a
            block, n). Scales and zero points float32 (n,).
        """
        with np.errstate(over="ignore", invalid="ignore"):
            scale, zero = self._handler.fit(work, self.scheme, self._scale_type)
            if not np.isfinite(scale).all():
                raise CheckpointError(
                    f"{self.name} has values in {where} that are not finite, or too large for scales of type "
                    f"{np.dtype(self._scale_type)}",
                    hint="the checkpoint is damaged, or needs float32 on this target",
                )
            round_to_levels(work, invert(scale), zero, self.scheme)
        levels = work.levels
        levels += np.float32(zero_level(self.scheme)) if self.scheme.symmetric else work.widen(zero)
        if self.scheme.bits == 8:
            return levels.astype(np.uint8), scale, zero
        if work.lanes == 1:
            pairs = np.multiply(levels[1::2], np.float32(16), out=work.scaled[: len(levels) // 2])
            pairs += levels[0::2]
            return pairs.astype(np.uint8), scale, zero
        both = levels.astype(np.uint8).view("<u2")  # the code of the even element in the lower byte
        high = both >> np.uint16(4)
        return np.bitwise_or(both, high, out=high).astype(np.uint8), scale, zero


def quantize_blocks(
    weights: Array,
    scheme: WeightScheme,
    scale_type: ScaleType = np.float32,
    name: str = "a matrix",
    importance: Array | None = None,
) -> PackedBlocks:
    """Quantize a matrix (N, K) that is in memory, in this thread.

    Args:
        importance: Weight of the square of an error in the search of scales, by input feature, float32 (K,);
            None if all have the same weight.

    Raises:
        CheckpointError: A value is not finite, or its scale does not fit `scale_type`.
    """
    out_features, in_features = weights.shape
    encoder = Encoder(name, out_features, in_features, scheme, scale_type, importance)
    encoder.encode_rows(0, weights)
    return encoder.finish()
