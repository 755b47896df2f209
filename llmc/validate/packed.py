"""Read weights of compiled kernels back by their layout, which llmc/kernels/matmul.h describes.

A group of 16 outputs is one row of bytes: codes, float16 scales (blocks, 16), zero points of 4 bits
(blocks, 16) or float16 minima (blocks, 16) if there are any. Codes lie by block in registers of 16 outputs
by 4 inputs; with 4 bits a byte holds two registers, the first in its low half. The operator's node states the
layout of its matrix.
"""

import json
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.errors import ParityError
from llmc.graph.model import PACKED, PackedZero
from llmc.runtime.stacks import unpack_codes

_OUTPUTS = 16
#: Bytes of a block's zero points or minima in a group.
_ZERO_BYTES: dict[int, int] = {
    PackedZero.MIDDLE: 0,
    PackedZero.CODE: _OUTPUTS // 2,
    PackedZero.MINIMUM: 2 * _OUTPUTS,
}
_NOT_STATED = (0, 0, 0, 0, -1)


@dataclass(frozen=True)
class PackedMatrix:
    """The matrix of `outputs` x `inputs` as kernels read it.

    Args:
        data: uint8 (groups, bytes of a group).
        bits: 4 or 8.
        block: Inputs that share a scale.
        zero: How zero is represented.
    """

    data: Array
    outputs: int
    inputs: int
    bits: int
    block: int
    zero: PackedZero

    def rows(self, start: int, stop: int) -> Array:
        """Return outputs start:stop, (stop - start, inputs) float32."""
        first = start // _OUTPUTS
        groups = self.data[first : -(-stop // _OUTPUTS)]
        count, blocks = len(groups), -(-self.inputs // self.block)
        scales_at = blocks * self.block * _OUTPUTS * self.bits // 8
        zeros_at = scales_at + 2 * blocks * _OUTPUTS
        codes = groups[:, :scales_at].reshape(count, blocks, -1, _OUTPUTS, 4)
        if self.bits == 4:
            halves = np.stack([codes & 15, codes >> 4], axis=3)
            codes = halves.reshape(count, blocks, -1, _OUTPUTS, 4)
        levels = codes.transpose(0, 3, 1, 2, 4).reshape(count, _OUTPUTS, blocks, self.block)
        scales = self._halves(groups, scales_at)
        values = levels.astype(np.float32)
        match self.zero:
            case PackedZero.MIDDLE:
                values = (values - (1 << (self.bits - 1))) * scales
            case PackedZero.CODE:
                pairs = groups[:, zeros_at : zeros_at + blocks * _OUTPUTS // 2]
                points = unpack_codes(pairs, 4).reshape(count, blocks, _OUTPUTS).swapaxes(1, 2)
                values = (values - points[..., None].astype(np.float32)) * scales
            case PackedZero.MINIMUM:
                values = values * scales + self._halves(groups, zeros_at)
        rows = values.reshape(count * _OUTPUTS, -1)[:, : self.inputs]
        part: Array = rows[start - first * _OUTPUTS : stop - first * _OUTPUTS]
        return part

    def _halves(self, groups: Array, at: int) -> Array:
        """Return the numbers of each block from byte `at` on, (groups, 16, blocks, 1) float32."""
        blocks = -(-self.inputs // self.block)
        halves = np.ascontiguousarray(groups[:, at : at + 2 * blocks * _OUTPUTS]).view(np.float16)
        numbers: Array = halves.reshape(len(groups), blocks, _OUTPUTS, 1).astype(np.float32)
        return numbers.swapaxes(1, 2)


def open_packed(value: ir.Value) -> PackedMatrix:
    """Open the matrix that an initializer of a compiled kernel's operator stores.

    Raises:
        ParityError: No node states its layout, or its size does not match the layout.
    """
    stated = (use.node.metadata_props.get(PACKED) for use in value.uses())
    layouts: dict[str, tuple[int, ...]] = next((json.loads(text) for text in stated if text is not None), {})
    outputs, inputs, bits, block, zero = layouts.get(str(value.name), _NOT_STATED)
    if value.const_value is None or zero not in _ZERO_BYTES:
        raise ParityError(f"no operator states the layout of the packed weight {value.name}")
    data = value.const_value.numpy()
    blocks = -(-inputs // block)
    size = blocks * _OUTPUTS * (block * bits // 8 + 2) + blocks * _ZERO_BYTES[zero]
    expected = (-(-outputs // _OUTPUTS), -(-size // 64) * 64)
    if data.shape != expected:
        raise ParityError(f"packed weight {value.name} has shape {data.shape}, its layout {expected}")
    return PackedMatrix(data, outputs, inputs, bits, block, PackedZero(zero))
