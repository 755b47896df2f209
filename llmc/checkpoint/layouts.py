"""Matrices of quantized checkpoints, read by rows: packed integers and fp8, as their libraries lay them out.

- GPTQ (AutoGPTQ, GPTQModel): `qweight` int32 (K * bits / 32, N), codes packed along the inputs, low bits
  first; `qzeros` int32 (groups, N * bits / 32), along the outputs, each smaller by one in the first layout;
  `scales` (groups, N); `g_idx` (K,), the group of each input.
- AWQ (AutoAWQ, gemm): `qweight` int32 (K, N / 8) and `qzeros` int32 (groups, N / 8), along the outputs, where
  the i-th 4 bits of a word are output 0 2 4 6 1 3 5 7 [i] of its eight; `scales` (groups, N).
- compressed-tensors: `weight_packed` int32 (N, K * bits / 32) or `weight` int8 (N, K), of signed codes that
  are packed with 2**(bits-1) added; `weight_scale` (N, groups) or one value; `weight_zero_point` int8
  (N, groups), or packed along the outputs like the codes; `weight_g_idx` (K,).
- fp8 (DeepSeek): `weight` float8 E4M3 (N, K), times `weight_scale_inv` of each tile of outputs and inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmc.checkpoint.quantization import ModuleFormat
from llmc.checkpoint.ranges import WholeValues
from llmc.errors import CheckpointError
from llmc.graph.weights import Array, CodeGrid, CodeRows, WeightStore

#: Output of each 4 bits of a word in AWQ's gemm layout.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Source:
    """The files' tensors of one module.

    Args:
        kept: What is kept of a tensor from one range of its rows to the next, by part; shared by all modules,
            so that each thread holds one tensor of a part at most.
    """

    def __init__(self, raw: WeightStore, module: str, kept: dict[str, WholeValues]) -> None:
        self._raw, self.module, self._kept = raw, module, kept

    def has(self, part: str) -> bool:
        return self._name(part) in self._raw.infos()

    def shape(self, part: str) -> tuple[int, ...]:
        """Raises CheckpointError: The files lack it."""
        if not self.has(part):
            raise CheckpointError(f"the files lack {self._name(part)}, which a quantized module needs")
        return self._raw.infos()[self._name(part)].shape

    def matrix(self, part: str) -> tuple[int, int]:
        """Raises CheckpointError: The files lack it, or it has not two axes."""
        shape = self.shape(part)
        if len(shape) != 2:
            raise CheckpointError(f"{self._name(part)} has shape {list(shape)}, and a matrix is expected")
        return shape[0], shape[1]

    def dtype(self, part: str) -> np.dtype:
        return self._raw.infos()[self._name(part)].dtype.numpy()

    def read(self, part: str, start: int = 0, stop: int | None = None) -> Array:
        return self._raw.read(self._name(part), start, stop)

    def rows(self, part: str, arrange: Callable[[Array], Array], start: int, stop: int) -> Array:
        """Rows of `arrange(whole tensor)`, which is kept while a walk over its rows goes on."""
        kept = self._kept.setdefault(part, WholeValues())
        return kept.rows(self.module, lambda: arrange(self.read(part)), start, stop)

    def require(self, part: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError: The tensor is missing or has another shape."""
        if self.shape(part) != shape:
            raise CheckpointError(
                f"{self._name(part)} has shape {list(self.shape(part))}, and {list(shape)} by the other "
                "tensors of its module and quantization_config"
            )

    def _name(self, part: str) -> str:
        return f"{self.module}.{part}"


def unpack_words(words: Array, bits: int, count: int) -> Array:
    """The first `count` codes of rows of int32, low bits first and across words, uint8 (n, count)."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8).reshape(len(words), -1)
    if 8 % bits == 0:
        parts = [(octets >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        codes: Array = np.stack(parts, axis=-1).reshape(len(words), -1)[:, :count]
        return codes
    single = np.unpackbits(octets, axis=1, bitorder="little", count=count * bits)
    packed = np.packbits(single.reshape(len(words), count, bits), axis=-1, bitorder="little")
    return packed[..., 0]


Part = Callable[[int, int], Array]


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix (N, K) of integer codes; its parts are read by a range of outputs.

    Args:
        groups: Scales of one output.
        group_size: Neighbouring inputs that share one.
        codes: uint8 (n, K).
        zero_points: uint8 (n, groups); None if all are 2**(bits - 1).
        scales: (n, groups), of type `scale_dtype`.
        index: Part of `source` with the group of each input; None if they are in order.
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
        """Outputs start:stop, as they are stored."""
        if self.zero_points is None:
            zeros = np.full((stop - start, self.groups), 1 << (self.bits - 1), np.uint8)
        else:
            zeros = self.zero_points(start, stop)
        return CodeRows(self.codes(start, stop), zeros, self.scales(start, stop))

    def rows(self, start: int, stop: int) -> Array:
        """Outputs start:stop, float32 (n, K); exact where scales have no more than 16 bits."""
        found = self.read(start, stop)
        group = self._groups
        values: Array = found.codes.astype(np.float32)
        values -= found.zero_points.astype(np.float32)[:, group]
        values *= found.scales.astype(np.float32)[:, group]
        return values

    def grid(self) -> CodeGrid | str:
        """The codes by block, or why they are in none."""
        return self._grid

    @cached_property
    def _in_order(self) -> Array:
        return np.arange(self.shape[1]) // self.group_size

    @cached_property
    def _groups(self) -> Array:
        if self.index is None:
            return self._in_order
        found = self.source.read(self.index).astype(np.int64)
        if found.min(initial=0) < 0 or found.max(initial=0) >= self.groups:
            raise CheckpointError(
                f"{self.source.module}.{self.index} names groups outside of the {self.groups} there are"
            )
        return found

    @cached_property
    def _grid(self) -> CodeGrid | str:
        if not np.array_equal(self._groups, self._in_order):
            return "its groups are scattered along the inputs (desc_act or actorder)"
        symmetric = self.zero_points is None or bool(
            (self.zero_points(0, self.shape[0]) == 1 << (self.bits - 1)).all()
        )
        return CodeGrid(self.bits, self.group_size, symmetric, self.scale_dtype, self.read)


@dataclass(frozen=True)
class Fp8Matrix:
    """A matrix (N, K) of float8 E4M3, with one scale, one by output, or one by tile.

    Args:
        tile: (outputs, inputs) of a tile; None for the others.
    """

    source: Source
    shape: tuple[int, int]
    scale_part: str
    tile: tuple[int, int] | None

    def rows(self, start: int, stop: int) -> Array:
        """Outputs start:stop, float32 (n, K)."""
        values: Array = self.source.read("weight", start, stop).astype(np.float32)
        scales = self.source.read(self.scale_part).astype(np.float32)
        if self.tile is not None:
            outputs, inputs = np.arange(start, stop) // self.tile[0], np.arange(self.shape[1]) // self.tile[1]
            values *= scales[outputs][:, inputs]
        elif scales.size == 1:
            values *= scales.reshape(())
        else:
            values *= scales.reshape(-1, 1)[start:stop]
        return values

    def grid(self) -> CodeGrid | str:
        """Why there are no integer codes."""
        return "it is stored in fp8"


def gptq_matrix(source: Source, form: ModuleFormat, zero_offset: int) -> IntegerMatrix:
    """The matrix whose `qweight` is packed along the inputs.

    A zero point that is the highest code when it is stored as one less stands for 0: quantizers give zero
    points of 0..2**bits - 1, and packing wraps.

    Raises:
        CheckpointError: Its tensors do not fit together.
    """
    words, outputs = source.matrix("qweight")
    inputs = source.shape("g_idx")[0] if source.has("g_idx") else words * 32 // form.bits
    bits = words * 32 // inputs if inputs else 0  # GPTQModel may have others than the config for some modules
    if bits not in {2, 3, 4, 8}:
        raise CheckpointError(f"{source.module}.qweight has {words} words for {inputs} inputs")
    groups, _ = source.matrix("scales")
    source.require("qweight", (inputs * bits // 32, outputs))
    source.require("scales", (groups, outputs))
    source.require("qzeros", (groups, outputs * bits // 32))

    def turn(words: Array) -> Array:
        return np.ascontiguousarray(words.T)

    def zeros(words: Array) -> Array:
        stored = unpack_words(words, bits, outputs)
        return turn((stored + np.uint8(zero_offset)) & np.uint8((1 << bits) - 1))

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
    """The matrix whose `qweight` is packed along the outputs in AutoAWQ's order.

    Raises:
        CheckpointError: Its tensors do not fit together.
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
    """The matrix of signed codes of compressed-tensors, packed or one a byte.

    Raises:
        CheckpointError: Its tensors do not fit together.
    """
    bits, packed = form.bits, source.has("weight_packed")
    if packed:
        outputs, inputs = (int(size) for size in source.read("weight_shape"))
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


def fp8_matrix(source: Source, form: ModuleFormat) -> Fp8Matrix:
    """The matrix of float8 E4M3 and its scales.

    Raises:
        CheckpointError: Its tensors do not fit together.
    """
    outputs, inputs = source.matrix("weight")
    part = "weight_scale_inv" if source.has("weight_scale_inv") else "weight_scale"
    shape = source.shape(part)
    if form.tile is not None and len(shape) == 2:
        source.require(part, (-(-outputs // form.tile[0]), -(-inputs // form.tile[1])))
        return Fp8Matrix(source, (outputs, inputs), part, form.tile)
    if int(np.prod(shape, dtype=np.int64)) not in {1, outputs}:
        raise CheckpointError(
            f"{source.module}.{part} has shape {list(shape)} for {outputs} outputs, and quantization_config "
            "has no weight_block_size"
        )
    return Fp8Matrix(source, (outputs, inputs), part, None)


def _group_size(source: Source, form: ModuleFormat, inputs: int, groups: int) -> int:
    """Inputs of a group: what the config says where it fits, else what the number of scales says."""
    wanted = form.group_size or inputs
    if -(-inputs // wanted) == groups:
        return wanted
    if inputs % groups == 0:
        return inputs // groups
    raise CheckpointError(f"{source.module} has {groups} groups for {inputs} inputs, not by {wanted}")
