"""Read codes, scales and minimums out of the bytes of ggml's block types.

Every type listed here stores a weight as code * scale, or code * scale + minimum, with a small integer code
(`block_q4_0` and its neighbours in ggml-common.h, https://github.com/ggml-org/ggml); the package `gguf`
unpacks them in NumPy. The codes are the result of that unpacking with every scale set to 1, so that only
`gguf` has to know the order of bits. The codebooks of IQ4 and FP4 have integer entries (FP4 doubled), and
are treated as 8-bit codes. IQ1, IQ2 and IQ3 store lattice points with signs; they are not read as codes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from llmc.arrays import Array
from llmc.graph.weights import CodeGrid, CodeRows

#: Function from raw blocks, uint8 (n, bytes per block), to scales or minimums, (n, groups per block).
Numbers = Callable[[Array], Array]


@dataclass(frozen=True)
class BlockCodes:
    """The code format of one block type.

    Args:
        bits: Codes are in 0..2**bits - 1.
        group: Number of weights that share a scale.
        ones: Bytes to write at an offset so that every scale is 1 and every minimum 0.
        scales: Reader of the scales, in the type that holds them.
        minimums: Reader of the minimums; None for types whose zero point is 2**(bits - 1).
        compact: Whether scales are products with more digits than float16 has.
    """

    bits: int
    group: int
    ones: Mapping[int, bytes]
    scales: Numbers
    minimums: Numbers | None = None
    compact: bool = False

    def grid(self, kind: int, read: Callable[[int, int], Array]) -> CodeGrid:
        """Return the codes of a matrix of ggml type `kind`.

        Args:
            read: Reads raw bytes of outputs start:stop, uint8 (n, bytes per row).
        """
        wide = np.dtype(np.float32 if self.compact else np.float16)

        def read_codes(start: int, stop: int) -> CodeRows:
            return self.unpack(kind, read(start, stop))

        return CodeGrid(
            self.bits,
            self.group,
            self.minimums is None,
            wide,
            read_codes,
            minimums=self.minimums is not None,
            compact=self.compact,
        )

    def unpack(self, kind: int, raw: Array) -> CodeRows:
        """Unpack codes, scales and minimums of rows of raw bytes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)][1]
        blocks = raw.reshape(-1, size)
        scales = self.scales(blocks).reshape(len(raw), -1)
        minimums = None if self.minimums is None else self.minimums(blocks).reshape(len(raw), -1)
        bare = blocks.copy()
        for at, data in self.ones.items():
            bare[:, at : at + len(data)] = np.frombuffer(data, np.uint8)
        middle = 1 << (self.bits - 1) if self.minimums is None else 0
        levels = quants.dequantize(bare.reshape(raw.shape), GGMLQuantizationType(kind))
        codes = (levels.astype(np.int16) + middle).astype(np.uint8)
        zeros = np.full(scales.shape, middle, np.uint8)
        return CodeRows(codes, zeros, scales, minimums)


def block_codes(kind: int) -> BlockCodes | None:
    """Return how ggml type `kind` stores its codes; None if they are not integers with a scale."""
    from gguf import GGMLQuantizationType

    return _types().get(GGMLQuantizationType(kind).name)


_ONE = np.float16(1).tobytes()
_ZERO = np.float16(0).tobytes()


def _half(at: int) -> Numbers:
    """Read the float16 at a byte offset of each block."""

    def read(blocks: Array) -> Array:
        return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)

    return read


def _times(half: int, factors: Numbers, sign: int = 1) -> Numbers:
    """Multiply the float16 at a byte offset of each block by integers, float32."""

    def read(blocks: Array) -> Array:
        return _half(half)(blocks).astype(np.float32) * (sign * factors(blocks).astype(np.float32))

    return read


def _nibbles(start: int, stop: int, shift: int) -> Numbers:
    return lambda blocks: (blocks[:, start:stop] >> shift) & 15


def _pairs_of_six(part: int) -> Numbers:
    """Read scales (0) or minimums (1) of Q4_K and Q5_K: eight of 6 bits each in bytes 4 to 15 of a block."""

    def read(blocks: Array) -> Array:
        from gguf import quants

        both: Array = quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))[part]
        return both

    return read


def _sixteen_of_six(blocks: Array) -> Array:
    """Read the scales of Q3_K: 16 of 6 bits, 4 in bytes 96 to 103 and 2 in 104 to 107; 32 stands for 0."""
    low = np.concatenate([blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4], axis=1)
    high = np.concatenate([(blocks[:, 104:108] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales: Array = (low | (high << 4)).astype(np.int8) - np.int8(32)
    return scales


def _eight_of_six(blocks: Array) -> Array:
    """Read the scales of IQ4_XS: eight of 6 bits, 2 in bytes 2 and 3 and 4 in 4 to 7; 32 stands for 0."""
    high = np.stack([(blocks[:, 2 + i // 4] >> (2 * (i % 4))) & 3 for i in range(8)], axis=1)
    low = np.stack([(blocks[:, 4 + i // 2] >> (4 * (i % 2))) & 15 for i in range(8)], axis=1)
    scales: Array = (low | (high << 4)).astype(np.int8) - np.int8(32)
    return scales


def _signed(start: int, stop: int) -> Numbers:
    return lambda blocks: np.ascontiguousarray(blocks[:, start:stop]).view(np.int8)


def _powers(blocks: Array) -> Array:
    """Compute the scales of MXFP4 for doubled values: 2**(byte - 128)."""
    return np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)


def _fp8_scales(blocks: Array) -> Array:
    """Read the scales of NVFP4 for doubled values, four per block."""
    from gguf import quants

    scales: Array = quants.NVFP4.ue4m3_to_fp32(np.ascontiguousarray(blocks[:, :4])).astype(np.float16)
    return scales


@cache
def _types() -> Mapping[str, BlockCodes]:
    """Map ggml's name of each type to its format; offsets are bytes of a block, as in ggml-common.h."""
    unit = b"\x01" * 4 + b"\x00" * 4 + b"\x01" * 4  # eight scales of 1 and eight minimums of 0, 6 bits each
    return {
        "Q4_0": BlockCodes(4, 32, {0: _ONE}, _half(0)),
        "Q4_1": BlockCodes(4, 32, {0: _ONE + _ZERO}, _half(0), _half(2)),
        "Q5_0": BlockCodes(5, 32, {0: _ONE}, _half(0)),
        "Q5_1": BlockCodes(5, 32, {0: _ONE + _ZERO}, _half(0), _half(2)),
        "Q8_0": BlockCodes(8, 32, {0: _ONE}, _half(0)),
        "Q2_K": BlockCodes(
            2,
            16,
            {0: b"\x01" * 16, 80: _ONE + _ZERO},
            _times(80, _nibbles(0, 16, 0)),
            _times(82, _nibbles(0, 16, 4), -1),
            compact=True,
        ),
        "Q3_K": BlockCodes(
            3, 16, {96: b"\x11" * 8 + b"\xaa" * 4 + _ONE}, _times(108, _sixteen_of_six), compact=True
        ),
        "Q4_K": BlockCodes(
            4,
            32,
            {0: _ONE + _ZERO + unit},
            _times(0, _pairs_of_six(0)),
            _times(2, _pairs_of_six(1), -1),
            compact=True,
        ),
        "Q5_K": BlockCodes(
            5,
            32,
            {0: _ONE + _ZERO + unit},
            _times(0, _pairs_of_six(0)),
            _times(2, _pairs_of_six(1), -1),
            compact=True,
        ),
        "Q6_K": BlockCodes(6, 16, {192: b"\x01" * 16 + _ONE}, _times(208, _signed(192, 208)), compact=True),
        "IQ4_NL": BlockCodes(8, 32, {0: _ONE}, _half(0)),
        "IQ4_XS": BlockCodes(
            8, 32, {0: _ONE + b"\xaa\xaa" + b"\x11" * 4}, _times(0, _eight_of_six), compact=True
        ),
        "TQ1_0": BlockCodes(2, 256, {52: _ONE}, _half(52)),
        "TQ2_0": BlockCodes(2, 256, {64: _ONE}, _half(64)),
        "MXFP4": BlockCodes(5, 32, {0: b"\x80"}, _powers, compact=True),
        "NVFP4": BlockCodes(5, 16, {0: b"\x40" * 4}, _fp8_scales),
    }
