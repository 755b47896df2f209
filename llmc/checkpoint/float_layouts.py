"""Read matrices of quantized checkpoints stored as small floats or as indices of a table of values.

- fp8 (DeepSeek, FBGEMM, compressed-tensors, ModelOpt, MXFP8): `weight` float8 E4M3 or E5M2 (N, K), times
  `weight_scale_inv` or `weight_scale`: one value, one per output, or one per tile of outputs and inputs.
- nvfp4 (ModelOpt): `weight` uint8 (N, K / 2), two E2M1 values per byte, the even input in the low half;
  `weight_scale` float8 E4M3 (N, K / 16), times `weight_scale_2`. compressed-tensors names the values
  `weight_packed`, and divides by `weight_global_scale`.
- mxfp4 (compressed-tensors, ModelOpt): the same with `weight_scale` uint8 (N, K / 32), powers of two with a
  bias of 127 (E8M0), https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
- mxfp4 of gpt-oss: `X_blocks` uint8 (experts, N, K / 32, 16) and `X_scales` uint8 (experts, N, K / 32) for a
  parameter X (experts, K, N).
- bitsandbytes' nf4 and fp4: `weight` holds the bytes of all codes in sequence, the first code in the high
  half; each code indexes `weight.quant_map`, times `weight.absmax` of its block. `weight.quant_state.*` holds
  JSON with shape and block size. Nested absmax are bytes: nested_quant_map[byte] * nested_absmax of its
  block + nested_offset.
"""

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmc.arrays import Array
from llmc.checkpoint.quantization import ModuleFormat
from llmc.checkpoint.recipes import FLOAT_HINT
from llmc.checkpoint.source import Source
from llmc.errors import CheckpointError, UnsupportedError
from llmc.graph.weights import CodeGrid, CodeRows, StackGrid

#: Tensors that hold the JSON state of bitsandbytes.
BNB_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")

#: Doubled E2M1 values by code; all of them are integers.
_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def _scales(source: Source, part: str, start: int = 0, stop: int | None = None) -> Array:
    """Read rows start:stop of scales as float32; bytes are powers of two with a bias of 127 (E8M0).

    Raises:
        CheckpointError: A byte is NaN in E8M0.
    """
    values = source.read(part, start, stop)
    if values.dtype != np.uint8:
        return values.astype(np.float32)
    if (values == 255).any():
        raise CheckpointError(f"{source.module}.{part} holds NaN (255)", hint="download the weights again")
    return np.ldexp(np.float32(1), values.astype(np.int32) - 127)


def _halves(packed: Array) -> Array:
    """Split bytes (…, n) into their halves, the low half first, (…, 2 n)."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _fp4_codes(packed: Array, scales: Array) -> CodeRows:
    """Express E2M1 values (n, K / 2) as 8-bit codes: doubled values, with halved scales (n, groups)."""
    codes = _E2M1_DOUBLED[_halves(packed)].view(np.uint8) ^ np.uint8(128)
    return CodeRows(codes, np.full(scales.shape, 128, np.uint8), scales * np.float32(0.5))


def require_no_zero_points(source: Source) -> None:
    """Check that small floats have no zero points other than 0.

    Raises:
        UnsupportedError: Another zero point is stored.
    """
    part = "weight_zero_point"
    if source.has(part) and source.read(part).astype(np.float32).any():
        raise UnsupportedError(
            f"{source.module}.{part} has zero points for small floats, which cannot be read", hint=FLOAT_HINT
        )


@dataclass(frozen=True)
class Fp8Matrix:
    """A float8 matrix (N, K) with one scale, one per output, or one per tile.

    Args:
        tile: Size of a tile as (outputs, inputs); None without tiles.
    """

    source: Source
    shape: tuple[int, int]
    scale_part: str
    tile: tuple[int, int] | None

    def rows(self, start: int, stop: int) -> Array:
        """Read outputs start:stop, float32 (n, K)."""
        values: Array = self.source.read("weight", start, stop).astype(np.float32)
        scales = _scales(self.source, self.scale_part)
        if self.tile is not None:
            scales = scales.reshape(-1, -(-self.shape[1] // self.tile[1]))
            outputs, inputs = np.arange(start, stop) // self.tile[0], np.arange(self.shape[1]) // self.tile[1]
            values *= scales[outputs][:, inputs]
        elif scales.size == 1:
            values *= scales.reshape(())
        else:
            values *= scales.reshape(-1, 1)[start:stop]
        return values

    def grid(self) -> CodeGrid | str:
        """Return the reason why there are no integer codes."""
        return "it is stored in fp8"


def fp8_matrix(source: Source, form: ModuleFormat) -> Fp8Matrix:
    """Return the float8 matrix and its scales.

    Raises:
        CheckpointError: The tensors of the module do not fit together.
    """
    outputs, inputs = source.matrix("weight")
    part = "weight_scale_inv" if source.has("weight_scale_inv") else "weight_scale"
    shape = source.shape(part)
    if form.tile is not None and len(shape) == 2:
        source.require(part, (-(-outputs // form.tile[0]), -(-inputs // form.tile[1])))
        return Fp8Matrix(source, (outputs, inputs), part, form.tile)
    if shape in {(), (1,), (outputs,)}:
        return Fp8Matrix(source, (outputs, inputs), part, None)
    tile = _tile_of(shape, (outputs, inputs))
    if tile is None:
        raise CheckpointError(
            f"{source.module}.{part} has shape {list(shape)} for {outputs} outputs, but quantization_config "
            "has no weight_block_size"
        )
    return Fp8Matrix(source, (outputs, inputs), part, tile)


def _tile_of(scales: tuple[int, ...], shape: tuple[int, int]) -> tuple[int, int] | None:
    """Derive the outputs and inputs that share a scale; None if the shapes do not determine them."""
    if len(scales) == 4 and scales[1] == scales[3] == 1:  # ModelOpt's tiles
        scales = scales[::2]
    if len(scales) != 2 or any(size % count for size, count in zip(shape, scales, strict=True)):
        return None
    return shape[0] // scales[0], shape[1] // scales[1]


@dataclass(frozen=True)
class Fp4Matrix:
    """A matrix (N, K) of E2M1 values in blocks of inputs, each with its own scale.

    Args:
        part: Tensor that holds the values, two per byte.
        block_size: Number of inputs that share a scale.
        factor: Factor applied to all scales.
    """

    source: Source
    shape: tuple[int, int]
    part: str
    block_size: int
    factor: np.float32

    def read(self, start: int, stop: int) -> CodeRows:
        """Read outputs start:stop as 8-bit codes: doubled values, with halved scales."""
        return _fp4_codes(self.source.read(self.part, start, stop), self._by_block(start, stop))

    def rows(self, start: int, stop: int) -> Array:
        """Read outputs start:stop, float32 (n, K)."""
        doubled = _E2M1_DOUBLED[_halves(self.source.read(self.part, start, stop))]
        scales = self._by_block(start, stop) * np.float32(0.5)
        values: Array = doubled.reshape(*scales.shape, self.block_size) * scales[:, :, None]
        return values.reshape(stop - start, -1)

    def grid(self) -> CodeGrid | str:
        """Return the values as a grid of 8-bit integers."""
        return CodeGrid(8, self.block_size, True, np.dtype(np.float32), self.read, even=False)

    def _by_block(self, start: int, stop: int) -> Array:
        return _scales(self.source, "weight_scale", start, stop) * self.factor


def nvfp4_matrix(source: Source, form: ModuleFormat) -> Fp4Matrix:
    """Return the matrix of E2M1 values with E4M3 scales and one global scale.

    Raises:
        CheckpointError: The tensors of the module do not fit together.
    """
    factor = np.float32(1)
    if source.has("weight_scale_2"):
        factor = _single(source, "weight_scale_2")
    elif source.has("weight_global_scale"):
        factor = np.float32(1) / _single(source, "weight_global_scale")
    return _fp4_matrix(source, factor)


def mxfp4_matrix(source: Source, form: ModuleFormat) -> Fp4Matrix:
    """Return the matrix of E2M1 values with powers of two as scales.

    Raises:
        CheckpointError: The tensors of the module do not fit together.
    """
    return _fp4_matrix(source, np.float32(1))


def _fp4_matrix(source: Source, factor: np.float32) -> Fp4Matrix:
    part = "weight_packed" if source.has("weight_packed") else "weight"
    outputs, half = source.matrix(part)
    _, groups = source.matrix("weight_scale")
    source.require("weight_scale", (outputs, groups))
    if not groups or 2 * half % groups:
        raise CheckpointError(f"{source.module}.{part} has {2 * half} inputs for {groups} scales per output")
    return Fp4Matrix(source, (outputs, 2 * half), part, 2 * half // groups, factor)


def _single(source: Source, part: str) -> np.float32:
    values = source.read(part).astype(np.float32).reshape(-1)
    if values.size != 1 or not np.isfinite(values[0]) or values[0] == 0:
        raise CheckpointError(f"{source.module}.{part} is not one finite number other than 0")
    return np.float32(values[0])


@dataclass(frozen=True)
class Fp4Experts:
    """The stacked matrices of gpt-oss, a parameter (experts, K, N); its rows are experts."""

    source: Source
    shape: tuple[int, int, int]

    def rows(self, start: int, stop: int) -> Array:
        """Read experts start:stop, float32 (n, K, N)."""
        experts, inputs, outputs = stop - start, *self.shape[1:]
        doubled = _E2M1_DOUBLED[_halves(self.source.read("blocks", start, stop))]
        scales = _scales(self.source, "scales", start, stop) * np.float32(0.5)
        values = (doubled * scales[..., None]).reshape(experts, outputs, inputs)
        return np.ascontiguousarray(values.swapaxes(1, 2))

    def read(self, start: int, stop: int) -> CodeRows:
        """Read outputs start:stop of all experts, one expert after the other, as 8-bit codes."""
        _, inputs, outputs = self.shape
        first, last = start // outputs, -(-stop // outputs)
        here = slice(start - first * outputs, stop - first * outputs)
        packed = self.source.read("blocks", first, last).reshape(-1, inputs // 2)[here]
        scales = _scales(self.source, "scales", first, last).reshape(-1, inputs // 32)[here]
        return _fp4_codes(packed, scales)

    def grid(self) -> CodeGrid | str:
        """Return the values as a grid of 8-bit integers."""
        outputs, wide = self.shape[2], np.dtype(np.float32)
        return StackGrid(8, 32, True, wide, self.read, outputs=outputs, turned=True, even=False)


def mxfp4_experts(source: Source, form: ModuleFormat) -> Fp4Experts:
    """Return the stack of matrices whose blocks of 32 inputs take 16 bytes.

    Raises:
        CheckpointError: The tensors of the module do not fit together.
    """
    shape = source.shape("blocks")
    if len(shape) != 4 or shape[3] != 16:
        raise CheckpointError(f"{source.module}_blocks has shape {list(shape)}, not (experts, N, K / 32, 16)")
    source.require("scales", shape[:3])
    return Fp4Experts(source, (shape[0], 32 * shape[2], shape[1]))


@dataclass(frozen=True)
class TableMatrix:
    """A bitsandbytes matrix (N, K) whose 4-bit codes index a table of 16 values.

    Args:
        block_size: Number of consecutive codes that share an absmax, counted through the whole matrix.
        state: The JSON object of `weight.quant_state.*`.
    """

    source: Source
    shape: tuple[int, int]
    block_size: int
    state: dict[str, object]

    def rows(self, start: int, stop: int) -> Array:
        """Read outputs start:stop, float32 (n, K)."""
        first, last = start * self.shape[1], stop * self.shape[1]
        packed = self._bytes(first // 2, -(-last // 2))
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[first % 2 :][: last - first]
        values: Array = self.source.read("weight.quant_map").astype(np.float32)[codes]
        values *= self._absmax[np.arange(first, last) // self.block_size]
        return values.reshape(stop - start, -1)

    def grid(self) -> CodeGrid | str:
        """Return the reason why the codes are not kept."""
        return f"its codes index a table of values ({self.state.get('quant_type')})"

    def _bytes(self, start: int, stop: int) -> Array:
        """Read bytes start:stop of the codes, which may be stored as a column of any type."""
        shape, size = self.source.shape("weight"), self.source.dtype("weight").itemsize
        if len(shape) != 2 or shape[1] != 1:
            return self.source.read("weight").reshape(-1).view(np.uint8)[start:stop]
        words = np.ascontiguousarray(self.source.read("weight", start // size, -(-stop // size)))
        return words.reshape(-1).view(np.uint8)[start % size :][: stop - start]

    @cached_property
    def _absmax(self) -> Array:
        stored = self.source.read("weight.absmax").reshape(-1)
        if not self.source.has("weight.nested_absmax"):
            return stored.astype(np.float32)
        table = self.source.read("weight.nested_quant_map").astype(np.float32)
        nested = self.source.read("weight.nested_absmax").astype(np.float32).reshape(-1)
        size = int(str(self.state["nested_blocksize"]))
        values: Array = table[stored] * nested[np.arange(len(stored)) // size]
        values += np.float32(str(self.state["nested_offset"]))
        return values


def table_matrix(source: Source, form: ModuleFormat) -> TableMatrix:
    """Return the matrix of nf4 or fp4 codes.

    Raises:
        CheckpointError: The tensors of the module do not fit together, or their JSON state is damaged.
    """
    part = next((p for p in BNB_STATES if source.has(p)), BNB_STATES[0])
    source.shape(part)
    try:
        state = json.loads(source.read(part).tobytes())
        outputs, inputs = (int(size) for size in state["shape"])
        block_size = int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{source.module}.{part} is damaged: {type(error).__name__}: {error}"
        ) from error
    source.require("weight.quant_map", (16,))
    stored = int(np.prod(source.shape("weight"))) * source.dtype("weight").itemsize
    blocks = int(np.prod(source.shape("weight.absmax")))
    if stored != -(-outputs * inputs // 2) or blocks != -(-outputs * inputs // block_size):
        raise CheckpointError(
            f"{source.module}.weight has {stored} bytes and {blocks} blocks for {outputs} x {inputs} codes "
            f"of 4 bits in blocks of {block_size}"
        )
    return TableMatrix(source, (outputs, inputs), block_size, state)
