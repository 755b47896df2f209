"""Define blocks of input features that share one scale: layout, rounding to levels, packing, dequantization.

A matrix of N outputs and K inputs is cut along K into blocks of `block_size`; the last block of a row
is padded with zeros. A weight is stored as `code` in 0..2**bits-1 and read back as
`(code - zero_point) * scale`, as the operator schemas of com.microsoft MatMulNBits and
GatherBlockQuantized define it; without stored zero points both use 2**(bits-1).

The methods work on *columns*, float32 (block_size, n): each block is a column, so that every NumPy
operation runs along contiguous memory and a reduction over a block is an addition of rows. A method that only
needs the extremes of a block may have it in several adjacent columns, *lanes*: elements that lie side by side
are then moved at once.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from llmc.arrays import Array
from llmc.config import WeightScheme

#: Number of elements per step: few enough for the cache, enough to hide NumPy's overhead per call.
STEP = 1 << 17

#: The element type of stored scales.
ScaleType = type[np.float32] | type[np.float16] | type[ml_dtypes.bfloat16]

#: Blocks whose range is below this are stored as zeros: the inverse of their scale would overflow float32.
SMALLEST = np.float32(2.0**-100)


@dataclass(frozen=True)
class PackedBlocks:
    """The data of a quantized matrix in the layout of MatMulNBits.

    Args:
        codes: uint8 (N, blocks, block_size * bits / 8); with 4 bits the even element of a pair is in
            the low half of its byte.
        scales: (N, blocks), of a `ScaleType`.
        zero_points: uint8 (N, ceil(blocks * bits / 8)), packed like the codes; or float32 (N, blocks), any
            numbers: -minimum / scale for weights of code * scale + minimum; None if symmetric.
        in_features: K without the padding.
        scheme: Bits, block size and symmetry of the codes.
    """

    codes: Array
    scales: Array
    zero_points: Array | None
    in_features: int
    scheme: WeightScheme


class Workspace:
    """The buffers that are reused from step to step, float32 (block_size / lanes, n * lanes).

    Column j * lanes + k holds elements k, lanes + k, 2 * lanes + k … of block j.

    Args:
        blocks: n, the largest number of blocks.
        importance: Weight of the square of each element's error; None if all have the same weight.
        lanes: Number of adjacent columns of a block; sums over a block need it in a single column. If there
            are several, all buffers are the same one.
    """

    def __init__(
        self, block_size: int, blocks: int, importance: Array | None = None, *, lanes: int = 1
    ) -> None:
        shape = (block_size // lanes, blocks * lanes)
        self.lanes = lanes
        self.columns = np.empty(shape, np.float32)
        self.scaled = np.empty(shape, np.float32) if lanes == 1 else self.columns
        self.levels = np.empty(shape, np.float32) if lanes == 1 else self.columns
        self.importance = importance

    def narrow(self, blocks: int) -> "Workspace":
        """Return the same buffers cut to the first `blocks` blocks."""
        view = object.__new__(Workspace)
        columns = blocks * self.lanes
        view.lanes = self.lanes
        view.columns = self.columns[:, :columns]
        view.scaled = self.scaled[:, :columns]
        view.levels = self.levels[:, :columns]
        view.importance = None if self.importance is None else self.importance[:, :columns]
        return view

    def extremes(self) -> tuple[Array, Array]:
        """Return the lowest and the highest value of each block, float32 (n,)."""
        low = np.minimum.reduce(self.columns, axis=0)
        high = np.maximum.reduce(self.columns, axis=0)
        for _ in range(self.lanes.bit_length() - 1):
            low, high = np.minimum(low[0::2], low[1::2]), np.maximum(high[0::2], high[1::2])
        return low, high

    def widen(self, values: Array) -> Array:
        """Return the value of each block, (n,), for each of its columns, (n * lanes,)."""
        return values if self.lanes == 1 else np.repeat(values, self.lanes)

    def dot(self, first: Array, second: Array) -> Array:
        """Sum the products of two buffers over each block, weighted by importance, float32 (n,)."""
        if self.importance is None:
            plain: Array = np.einsum("ij,ij->j", first, second)
            return plain
        weighted: Array = np.einsum("ij,ij,ij->j", first, second, self.importance)
        return weighted


def count_blocks(in_features: int, block_size: int) -> int:
    """Return the number of blocks of one row, including the padded one."""
    return -(-in_features // block_size)


def stored_bytes(shape: tuple[int, int], scheme: WeightScheme, scale_bytes: int) -> int:
    """Return the bytes of a matrix (N, K): codes, scales of `scale_bytes` each, and any zero points."""
    out_features, in_features = shape
    blocks = count_blocks(in_features, scheme.block_size)
    zeros = 0 if scheme.symmetric else -(-blocks * scheme.bits // 8)
    return out_features * (blocks * (scheme.block_size * scheme.bits // 8 + scale_bytes) + zeros)


def zero_level(scheme: WeightScheme) -> int:
    """Return the zero point of symmetric codes."""
    return 1 << (scheme.bits - 1)


def round_to_levels(work: Workspace, inverse: Array, zero: Array, scheme: WeightScheme) -> None:
    """Set `work.scaled` to columns * inverse and `work.levels` to the nearest value of code - zero.

    Args:
        inverse: 1 / scale, float32 (n,).
        zero: Zero points, float32 (n,); not read for symmetric schemes.
    """
    np.multiply(work.columns, work.widen(inverse), out=work.scaled)
    np.rint(work.scaled, out=work.levels)
    middle = zero_level(scheme)
    if scheme.symmetric:
        np.clip(work.levels, -middle, middle - 1, out=work.levels)
    else:
        lowest = -work.widen(zero)
        np.maximum(work.levels, lowest, out=work.levels)
        np.minimum(work.levels, lowest + (2 * middle - 1), out=work.levels)


def invert(scale: Array) -> Array:
    """Return 1 / scale, and 0 where the scale is 0."""
    inverse: Array = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    return inverse


def pack(codes: Array, bits: int) -> Array:
    """Pack uint8 codes (..., n) into bytes (..., ceil(n * bits / 8)), low-order bits first, padded with 0."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    packed: Array = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed


def unpack(packed: Array, bits: int, count: int) -> Array:
    """Return the first `count` codes of packed bytes (..., m), as uint8 (..., count)."""
    if bits == 8:
        return packed[..., :count]
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)[..., :count]


def dequantize_blocks(blocks: PackedBlocks) -> Array:
    """Return the weights that an operator computes with, float32 (N, K)."""
    scheme = blocks.scheme
    count = blocks.scales.shape[1]
    codes = unpack(blocks.codes, scheme.bits, scheme.block_size).astype(np.float32)
    if blocks.zero_points is None:
        codes -= zero_level(scheme)
    elif blocks.zero_points.dtype == np.uint8:
        codes -= unpack(blocks.zero_points, scheme.bits, count)[:, :, None]
    else:
        codes -= blocks.zero_points[:, :, None]
    codes *= blocks.scales.astype(np.float32)[:, :, None]
    return codes.reshape(len(codes), -1)[:, : blocks.in_features]


def round_scales(scale: Array, scale_type: ScaleType) -> Array:
    """Round scales to `scale_type`, and return them as float32."""
    return scale.astype(scale_type).astype(np.float32)
