"""Pack quantized weights in the order in which kernels read them (layout: llmc/kernels/matmul.h)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmc.arrays import Array
from llmc.errors import CheckpointError
from llmc.graph.model import PackedZero
from llmc.graph.weights import WeightGroup

GROUP = 16


@dataclass(frozen=True)
class PackedLayout:
    """The sizes of a packed matrix of N outputs and K inputs.

    Args:
        bits: 4 or 8.
        zero: Representation of zero; with 8 bits not a code per block.
    """

    n: int
    k: int
    bits: int
    block: int
    zero: PackedZero

    @property
    def blocks(self) -> int:
        return -(-self.k // self.block)

    @property
    def groups(self) -> int:
        return -(-self.n // GROUP)

    @property
    def scales_at(self) -> int:
        """Return the first byte of a group's scales, which follow its codes."""
        return self.blocks * self.block * GROUP * self.bits // 8

    @property
    def zeros_at(self) -> int:
        return self.scales_at + self.blocks * GROUP * 2

    @property
    def group_bytes(self) -> int:
        return -(-(self.zeros_at + self.zeros_bytes) // 64) * 64

    @property
    def zeros_bytes(self) -> int:
        """Return the bytes of a group's zero points or minimums."""
        match self.zero:
            case PackedZero.MIDDLE:
                return 0
            case PackedZero.CODE:
                return self.blocks * GROUP // 2
            case PackedZero.MINIMUM:
                return self.blocks * GROUP * 2


@dataclass(frozen=True)
class PackedWeight:
    """The computation of a packed matrix, uint8 (groups, bytes of a group), from MatMulNBits's group.

    Args:
        source: Group with `codes`, `scales` and, if there are zero points, `zero_points`.
    """

    source: WeightGroup
    layout: PackedLayout

    def __call__(self) -> Mapping[str, Array]:
        members = self.source.compute()
        return {"packed": pack_groups(members, self.layout)}


def pack_groups(members: Mapping[str, Array], layout: PackedLayout) -> Array:
    """Return the packed matrix as bytes, uint8 (groups, bytes of a group).

    Args:
        members: codes uint8 (N, blocks, block * bits / 8), scales (N, blocks) of any floating type,
            zero_points uint8 (N, ceil(blocks / 2)) of 4 bits each, or floating (N, blocks); as in
            MatMulNBits. For floating ones the minimum -zero_point * scale is stored, which restores the
            float16 number of a GGUF file if zero points are float32.

    Raises:
        CheckpointError: A scale or a minimum is too large for float16.
    """
    groups, blocks, block = layout.groups, layout.blocks, layout.block
    codes = members["codes"].reshape(layout.n, blocks, -1)
    packed = np.zeros((groups, layout.group_bytes), np.uint8)
    if layout.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(layout.n, blocks, block)
    rows = _pad(codes, groups).reshape(groups, GROUP, blocks, block // 4, 4)
    lanes = rows.transpose(0, 2, 3, 1, 4)  # group, block, register, output, input
    if layout.bits == 4:
        lanes = lanes[:, :, 0::2] | (lanes[:, :, 1::2] << 4)
    packed[:, : layout.scales_at] = lanes.reshape(groups, -1)
    scales = members["scales"].astype(np.float32)
    packed[:, layout.scales_at : layout.zeros_at] = _halves("scale", scales, groups)
    zeros = slice(layout.zeros_at, layout.zeros_at + layout.zeros_bytes)
    if layout.zero is PackedZero.CODE:
        packed[:, zeros] = _nibbles(members["zero_points"], blocks, groups)
    elif layout.zero is PackedZero.MINIMUM:
        points = members["zero_points"].reshape(layout.n, blocks).astype(np.float32)
        packed[:, zeros] = _halves("minimum", -points * scales, groups)
    return packed


def _halves(name: str, values: Array, groups: int) -> Array:
    """Round float32 (N, blocks) to float16, as bytes of each group."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise CheckpointError(
            f"a {name} of {np.abs(values).max():g} is too large for float16, in which kernels read it",
            hint="the checkpoint is damaged, or needs a target without compiled kernels",
        )
    return _by_lane(halves, groups).reshape(groups, -1).view(np.uint8)


def _nibbles(pairs: Array, blocks: int, groups: int) -> Array:
    """Convert zero points of 4 bits, two in a byte along the blocks, to bytes of each group."""
    zeros = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)[:, :blocks]
    turned = _by_lane(zeros, groups)
    joined: Array = (turned[..., 0::2] | (turned[..., 1::2] << 4)).reshape(groups, -1)
    return joined


def _pad(rows: Array, groups: int) -> Array:
    """Append zeros after the last output up to a whole group."""
    missing = groups * GROUP - len(rows)
    if not missing:
        return rows
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])


def _by_lane(values: Array, groups: int) -> Array:
    """Reorder (N, blocks) to (groups, blocks, 16), contiguous."""
    padded = _pad(values, groups).reshape(groups, GROUP, -1)
    return np.ascontiguousarray(padded.transpose(0, 2, 1))
