"""Read integer matrices of quantized checkpoints by rows, in the layouts of their libraries.

- GPTQ (AutoGPTQ, GPTQModel, auto-round): `qweight` int32 (K * bits / 32, N), codes packed along the inputs,
  low bits first; `qzeros` int32 (groups, N * bits / 32), packed along the outputs, each stored less one in
  the first layout; `scales` (groups, N); `g_idx` (K,), the group of each input.
- AWQ (AutoAWQ, gemm): `qweight` int32 (K, N / 8) and `qzeros` int32 (groups, N / 8), packed along the
  outputs; the i-th 4 bits of a word are output [0 2 4 6 1 3 5 7][i] of its eight; `scales` (groups, N).
- compressed-tensors: `weight_packed` int32 (N, K * bits / 32) or `weight` int8 (N, K), with signed codes that
  are packed after adding 2**(bits-1); `weight_scale` (N, groups) or one value; `weight_zero_point` int8
  (N, groups), or packed along the outputs like the codes; `weight_g_idx` (K,).
- ModelOpt: `weight` int8 (N, K) with `weight_scale` (N,), or uint8 (N / 2, K) with signed 4-bit codes, the
  even output in the low half, with `weight_scale` (N, groups).
- bitsandbytes' LLM.int8: `weight` int8 (N, K) and `SCB` (N,), the largest magnitude of each output.
- MLX: `weight` uint32 (N, K * bits / 32), low bits first; a weight is code * scale + bias, with `scales` and
  `biases` (N, groups).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from llmc.arrays import Array
from llmc.checkpoint.quantization import ModuleFormat
from llmc.checkpoint.source import Part, Source
from llmc.errors import CheckpointError, UnsupportedError
from llmc.graph.weights import CodeGrid, CodeRows

#: Output at each 4-bit position of a word in AWQ's gemm layout.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(words: Array, bits: int, count: int) -> Array:
    """Unpack the first `count` codes of rows of 32-bit words, low bits first, uint8 (n, count).

    Codes may extend across words.
    """
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    if 8 % bits == 0:
        parts = [(octets >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        codes: Array = np.stack(parts, axis=-1).reshape(len(words), -1)[:, :count]
        return codes
    single = np.unpackbits(octets, axis=1, bitorder="little", count=count * bits)
    packed = np.packbits(single.reshape(len(words), count, bits), axis=-1, bitorder="little")
    return packed[..., 0]


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix (N, K) of integer codes whose parts are read by a range of outputs.

    Args:
        groups: Number of scales per output.
        group_size: Number of adjacent inputs that share a scale.
        codes: Reader of codes, uint8 (n, K).
        zero_points: Reader of zero points, uint8 (n, groups); None if all are 2**(bits - 1).
        scales: Reader of scales, (n, groups), of type `scale_dtype`.
        index: Part of `source` with the group of each input; None if the groups are in order.
    """

    source: Source
    shape: tuple[int, int]
    bits: int
    groups: int
    group_size: int
    codes: Part
    zero_points: Part | None
    scales: Part
    scale_dtype: np.dtype
    index: str | None

    def read(self, start: int, stop: int) -> CodeRows:
        """Read outputs start:stop as stored."""
        if self.zero_points is None:
            zeros = np.full((stop - start, self.groups), 1 << (self.bits - 1), np.uint8)
        else:
            zeros = self.zero_points(start, stop)
        return CodeRows(self.codes(start, stop), zeros, self.scales(start, stop))

    def rows(self, start: int, stop: int) -> Array:
        """Read outputs start:stop, float32 (n, K); exact where scales have at most 16 bits."""
        stored = self.read(start, stop)
        group = self._groups
        values: Array = stored.codes.astype(np.float32)
        values -= stored.zero_points.astype(np.float32)[:, group]
        values *= stored.scales.astype(np.float32)[:, group]
        return values

    def grid(self) -> CodeGrid | str:
        """Return the codes by block, or the reason why they are not in blocks."""
        return self._grid

    @cached_property
    def _in_order(self) -> Array:
        return np.arange(self.shape[1]) // self.group_size

    @cached_property
    def _groups(self) -> Array:
        if self.index is None:
            return self._in_order
        indices = self.source.read(self.index).astype(np.int64)
        if indices.min(initial=0) < 0 or indices.max(initial=0) >= self.groups:
            raise CheckpointError(
                f"{self.source.module}.{self.index} names groups beyond the {self.groups} that exist"
            )
        return indices

    @cached_property
    def _grid(self) -> CodeGrid | str:
        if not np.array_equal(self._groups, self._in_order):
            return "its groups are scattered along the inputs (desc_act or actorder)"
        symmetric = self.zero_points is None or bool(
            (self.zero_points(0, self.shape[0]) == 1 << (self.bits - 1)).all()
        )
        return CodeGrid(self.bits, self.group_size, symmetric, self.scale_dtype, self.read)


def gptq_matrix(
    source: Source, form: ModuleFormat, zero_offset: int, *, symmetric: bool = False
) -> IntegerMatrix:
    """Return the matrix whose `qweight` is packed along the inputs.

    A stored zero point of 2**bits - 1 in the layout that stores zero points less one stands for 0: quantizers
    produce zero points of 0..2**bits - 1, and packing wraps around.

    Args:
        symmetric: Whether all zero points are declared to be 2**(bits - 1); the stored ones then show the
            offset.

    Raises:
        CheckpointError: The tensors of the module do not fit together.
    """
    words, outputs = source.matrix("qweight")
    groups, _ = source.matrix("scales")
    _, zero_words = source.matrix("qzeros")
    bits = zero_words * 32 // outputs if outputs else 0  # some modules have other bits than the config says
    if source.has("g_idx"):
        inputs = source.shape("g_idx")[0]
        bits = words * 32 // inputs if inputs else 0
    if bits not in {2, 3, 4, 8}:
        raise CheckpointError(
            f"{source.module}.qweight has {words} words of {bits} bits for {outputs} outputs"
        )
    inputs = words * 32 // bits
    source.require("qweight", (inputs * bits // 32, outputs))
    source.require("scales", (groups, outputs))
    source.require("qzeros", (groups, outputs * bits // 32))

    def turn(words: Array) -> Array:
        return np.ascontiguousarray(words.T)

    def zeros(words: Array) -> Array:
        stored = unpack_words(words, bits, outputs)
        missing = (1 << (bits - 1)) - int(stored[0, 0]) if stored.size else 0
        is_certain = symmetric and missing in {0, 1} and bool((stored == stored[0, 0]).all())
        offset = np.uint8(missing if is_certain else zero_offset)
        return turn((stored + offset) & np.uint8((1 << bits) - 1))

    return IntegerMatrix(
        source,
        (outputs, inputs),
        bits,
        groups,
        _group_size(source, form, inputs, groups),
        lambda start, stop: unpack_words(source.rows("qweight", turn, start, stop), bits, inputs),
        lambda start, stop: source.rows("qzeros", zeros, start, stop),
        lambda start, stop: source.rows("scales", turn, start, stop),
        source.dtype("scales"),
        "g_idx" if source.has("g_idx") else None,
    )


def awq_matrix(source: Source, form: ModuleFormat) -> IntegerMatrix:
    """Return the matrix whose `qweight` is packed along the outputs in AutoAWQ's order.

    Raises:
        CheckpointError: The tensors of the module do not fit together.
    """
    inputs, _ = source.matrix("qweight")
    groups, outputs = source.matrix("scales")
    source.require("qweight", (inputs, outputs // 8))
    source.require("qzeros", (groups, outputs // 8))

    def turn(words: Array) -> Array:
        return np.ascontiguousarray(words.T)

    def unpack(part: str, start: int, stop: int) -> Array:
        first = start // 8
        eights = source.rows(part, turn, first, -(-stop // 8)).view(np.uint32)
        codes = np.empty((len(eights), 8, eights.shape[1]), np.uint8)
        for place, output in enumerate(_AWQ_ORDER):
            codes[:, output] = (eights >> np.uint32(4 * place)) & np.uint32(15)
        return codes.reshape(-1, eights.shape[1])[start - 8 * first : stop - 8 * first]

    return IntegerMatrix(
        source,
        (outputs, inputs),
        4,
        groups,
        _group_size(source, form, inputs, groups),
        lambda start, stop: unpack("qweight", start, stop),
        lambda start, stop: unpack("qzeros", start, stop),
        lambda start, stop: source.rows("scales", turn, start, stop),
        source.dtype("scales"),
        None,
    )


def compressed_matrix(source: Source, form: ModuleFormat) -> IntegerMatrix:
    """Return the matrix of compressed-tensors' signed codes, packed or one per byte.

    Raises:
        CheckpointError: The tensors of the module do not fit together.
    """
    bits, packed = form.bits, source.has("weight_packed")
    if packed:
        outputs, inputs = (int(size) for size in source.read("weight_shape"))
        bits = _packed_bits(source, bits, inputs)
        source.require("weight_packed", (outputs, -(-inputs * bits // 32)))
    else:
        outputs, inputs = source.matrix("weight")
    scale_shape = source.shape("weight_scale")
    scale_count = int(np.prod(scale_shape, dtype=np.int64))
    groups = scale_shape[1] if len(scale_shape) == 2 else 1
    if scale_count not in {1, outputs * groups}:
        raise CheckpointError(
            f"{source.module}.weight_scale has shape {list(scale_shape)} for {outputs} outputs"
        )

    def signed(codes: Array) -> Array:
        return (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)

    def codes(start: int, stop: int) -> Array:
        if packed:
            return unpack_words(source.read("weight_packed", start, stop), bits, inputs)
        return signed(source.read("weight", start, stop))

    def by_output(values: Array) -> Array:
        return np.broadcast_to(values.reshape(-1, groups), (outputs, groups))

    def zeros(values: Array) -> Array:
        if values.dtype == np.int32:  # packed along the outputs
            return unpack_words(np.ascontiguousarray(values.T), bits, outputs).T
        return by_output(signed(values))

    zero_part = "weight_zero_point" if source.has("weight_zero_point") else None
    return IntegerMatrix(
        source,
        (outputs, inputs),
        bits,
        groups,
        _group_size(source, form, inputs, groups),
        codes,
        None if zero_part is None else lambda start, stop: source.rows(zero_part, zeros, start, stop),
        lambda start, stop: source.rows("weight_scale", by_output, start, stop),
        source.dtype("weight_scale"),
        "weight_g_idx" if source.has("weight_g_idx") else None,
    )


def _packed_bits(source: Source, declared: int, inputs: int) -> int:
    """Return the bits of packed codes: as declared if that fits, else as the word count implies."""
    words = source.matrix("weight_packed")[1]
    fitting = [bits for bits in range(2, 9) if -(-inputs * bits // 32) == words]
    return declared if declared in fitting or len(fitting) != 1 else fitting[0]


def modelopt_int4_matrix(source: Source, form: ModuleFormat) -> IntegerMatrix:
    """Return ModelOpt's matrix of signed 4-bit codes, two outputs per byte, the even one in the low half.

    Raises:
        CheckpointError: The tensors of the module do not fit together.
    """
    pairs, inputs = source.matrix("weight")
    outputs, groups = source.matrix("weight_scale")
    source.require("weight", (outputs // 2, inputs))

    def codes(start: int, stop: int) -> Array:
        both = source.read("weight", start // 2, -(-stop // 2))
        signed = np.stack([both & 15, both >> 4], axis=1).reshape(-1, inputs)
        return signed[start % 2 :][: stop - start] ^ np.uint8(8)

    return IntegerMatrix(
        source,
        (2 * pairs, inputs),
        4,
        groups,
        _group_size(source, form, inputs, groups),
        codes,
        None,
        lambda start, stop: source.read("weight_scale", start, stop),
        source.dtype("weight_scale"),
        None,
    )


def bitsandbytes_int8_matrix(source: Source, form: ModuleFormat) -> IntegerMatrix:
    """Return the matrix of LLM.int8's signed bytes: a weight is byte * SCB / 127.

    Raises:
        CheckpointError: The tensors of the module do not fit together.
        UnsupportedError: It is stored in the order of a GPU's kernels.
    """
    outputs, inputs = source.matrix("weight")
    source.require("SCB", (outputs,))
    if source.has("weight_format") and int(source.read("weight_format").reshape(-1)[0]) != 0:
        raise UnsupportedError(
            f"{source.module}.weight is stored in the order of a GPU's kernels (weight_format is not 0)",
            hint="save it again with a newer bitsandbytes, which stores rows",
        )

    def scales(values: Array) -> Array:
        return values.astype(np.float32).reshape(-1, 1) / np.float32(127)

    return IntegerMatrix(
        source,
        (outputs, inputs),
        8,
        1,
        inputs,
        lambda start, stop: source.read("weight", start, stop).view(np.uint8) ^ np.uint8(128),
        None,
        lambda start, stop: source.rows("SCB", scales, start, stop),
        np.dtype(np.float32),
        None,
    )


@dataclass(frozen=True)
class AffineMatrix:
    """An MLX matrix (N, K): code * scale + bias, with one scale and one bias per group of inputs."""

    source: Source
    shape: tuple[int, int]
    bits: int
    group_size: int

    def read(self, start: int, stop: int) -> CodeRows:
        """Read outputs start:stop as stored."""
        codes, scales, biases = self._parts(start, stop)
        return CodeRows(codes, np.zeros(scales.shape, np.uint8), scales, biases)

    def rows(self, start: int, stop: int) -> Array:
        """Read outputs start:stop, float32 (n, K)."""
        codes, scales, biases = self._parts(start, stop)
        values: Array = codes.reshape(stop - start, -1, self.group_size).astype(np.float32)
        values *= scales.astype(np.float32)[:, :, None]
        values += biases.astype(np.float32)[:, :, None]
        return values.reshape(stop - start, -1)

    def grid(self) -> CodeGrid | str:
        """Return the codes as a grid, with the biases as minimums."""
        kind = self.source.dtype("scales")
        return CodeGrid(self.bits, self.group_size, False, kind, self.read, minimums=True)

    def _parts(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        words, scales, biases = (
            self.source.read(part, start, stop) for part in ("weight", "scales", "biases")
        )
        return unpack_words(words, self.bits, self.shape[1]), scales, biases


def affine_matrix(source: Source, form: ModuleFormat) -> AffineMatrix:
    """Return the matrix of MLX's affine mode; its shape determines the bits.

    Raises:
        CheckpointError: The tensors of the module do not fit together.
    """
    outputs, words = source.matrix("weight")
    _, groups = source.matrix("scales")
    inputs = groups * (form.group_size or 0)
    bits = words * 32 // inputs if inputs else 0
    if bits not in {2, 3, 4, 5, 6, 8} or words * 32 != inputs * bits:
        raise CheckpointError(
            f"{source.module}.weight has {words} words for {groups} groups of {form.group_size} inputs"
        )
    source.require("scales", (outputs, groups))
    source.require("biases", (outputs, groups))
    return AffineMatrix(source, (outputs, inputs), bits, form.group_size or 0)


class _Rows(Protocol):
    """A matrix (N, K) that is read by outputs."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Array: ...


@dataclass(frozen=True)
class ScaledInputs:
    """A matrix (N, K) whose inputs are multiplied by factors (K,) first; the factors are folded into it."""

    source: Source
    inner: _Rows
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Array:
        """Read outputs start:stop, float32 (n, K)."""
        factors = self.source.read("pre_quant_scale").astype(np.float32).reshape(-1)
        scaled: Array = self.inner.rows(start, stop) * factors
        return scaled

    def grid(self) -> CodeGrid | str:
        """Return the reason why its codes are not kept."""
        return "its inputs are scaled (pre_quant_scale)"


def scale_inputs(source: Source, inner: _Rows) -> ScaledInputs:
    """Return the matrix of ModelOpt whose AWQ scales its inputs with `pre_quant_scale`.

    Raises:
        CheckpointError: The number of factors differs from the number of inputs.
    """
    if int(np.prod(source.shape("pre_quant_scale"))) != inner.shape[-1]:
        raise CheckpointError(
            f"{source.module}.pre_quant_scale has shape {list(source.shape('pre_quant_scale'))} for "
            f"{inner.shape[-1]} inputs"
        )
    return ScaledInputs(source, inner, inner.shape)


def _group_size(source: Source, form: ModuleFormat, inputs: int, groups: int) -> int:
    """Return the inputs per group: as declared if that fits, else as the number of scales implies."""
    declared = form.group_size or inputs
    if -(-inputs // declared) == groups:
        return declared
    if inputs % groups == 0:
        return inputs // groups
    raise CheckpointError(
        f"{source.module} has {groups} groups for {inputs} inputs, but the group size is {declared}"
    )
