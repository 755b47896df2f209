"""Define what a format of quantized checkpoints does with a matrix, and check what it is given.

A matrix is a linear layer (N outputs, K inputs) of integer codes by group of inputs, value
`(code - zero point) * scale`, or of small floats, value `code * scale * whole`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.config import EngineScheme, WeightFormat, WeightScheme
from llmc.errors import CheckpointError
from llmc.quantize.blocks import pack, unpack

#: Number of inputs that share a scale in NVFP4.
NVFP4_GROUP = 16


class Codes(NamedTuple):
    """The codes of one matrix (N, K).

    Args:
        codes: Integers 0..2**bits - 1, packed low bits first, uint8 (N, K * bits / 8); or int8, float8_e4m3fn
            or float4_e2m1fn of ml_dtypes, (N, K).
        scales: (N, groups), (N, 1) or, for a scale per tensor, (1, 1), float; float8_e4m3fn (N, K / 16) for
            nvfp4.
        zero_points: uint8 (N, groups); None if all are 2**(bits - 1), or 0 for signed codes.
        whole: The factor of all scales of nvfp4, float32, a scalar.
    """

    codes: Array
    scales: Array
    zero_points: Array | None = None
    whole: Array | None = None


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix (N, K) to write, whose codes are read one matrix at a time.

    Args:
        module: Name of the module in the folder, without `.weight`.
        scheme: The storage of the codes.
        read: Reads the codes.
        input_scale: Scale of the products' activation: the code of an activation is its value divided by it.
            None if activations are not quantized, or by token at run time.
        scale_type: Type in which scales of groups and outputs are stored; it must represent them exactly.
        alias: Name of the module in transformers; empty if it is `module`.
    """

    module: str
    shape: tuple[int, int]
    scheme: WeightScheme | EngineScheme
    read: Callable[[], Codes]
    input_scale: float | None = None
    scale_type: ir.DataType = ir.DataType.FLOAT16
    alias: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the module in the folder, and in transformers if it is another."""
        return (self.module,) if self.alias in ("", self.module) else (self.module, self.alias)


class FolderTensor(NamedTuple):
    """A tensor of the folder, before its values are known."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]


class Format(Protocol):
    """A format of quantized checkpoints: the tensors of a matrix, and their declaration."""

    def refusal(self, scheme: WeightScheme | EngineScheme, shape: tuple[int, int]) -> str | None:
        """Return why the format cannot hold a matrix (N, K); None if it can."""
        ...

    def mixed_refusal(self, schemes: Iterable[WeightScheme | EngineScheme]) -> str | None:
        """Return why one folder cannot hold matrices of these schemes; None if it can.

        Each scheme is one that `refusal` accepts.
        """
        ...

    def specs(self, matrix: CodedMatrix) -> tuple[FolderTensor, ...]:
        """Return the tensors of a matrix, in the order of their names."""
        ...

    def encode(self, matrix: CodedMatrix, codes: Codes) -> dict[str, Array]:
        """Return the values of the tensors of `specs`.

        Raises:
            CheckpointError: The codes do not fit the matrix, or a scale is not a positive number that the
                format can store.
        """
        ...

    def cache_tensors(self, attention: str, keys: float, values: float) -> dict[str, Array]:
        """Return the tensors with the scales of the KV cache of the module `attention`.

        Only formats with `has_cache_scales` have any.
        """
        ...

    def config(self, matrices: Sequence[CodedMatrix], ignored: Sequence[str]) -> dict[str, Any]:
        """Return `quantization_config` of config.json.

        Args:
            ignored: Names of the linear modules that stay in float, the head among them.
        """
        ...

    def side_files(self, matrices: Sequence[CodedMatrix], ignored: Sequence[str]) -> dict[str, Any]:
        """Return the JSON documents that the format has beside config.json, by their file names."""
        ...


def group_of(scheme: WeightScheme | EngineScheme) -> int | None:
    """Return the number of inputs that share a scale; None if all inputs of an output share one."""
    if isinstance(scheme, EngineScheme) and scheme.format is WeightFormat.NVFP4:
        return NVFP4_GROUP
    return scheme.block_size


def is_integer(scheme: WeightScheme | EngineScheme) -> bool:
    """Return whether codes are integers; otherwise they are small floats."""
    return isinstance(scheme, WeightScheme) or scheme.format in (WeightFormat.INT8, WeightFormat.INT4)


def describe_scheme(scheme: WeightScheme | EngineScheme) -> str:
    """Return a scheme for messages, such as `4-bit integers by groups of 128, with zero points`."""
    group = group_of(scheme)
    if isinstance(scheme, EngineScheme) and not is_integer(scheme):
        return f"{scheme.format.value} with {scheme.activations} activations"
    text = f"{scheme.bits}-bit integers by {'output' if group is None else f'groups of {group}'}"
    if isinstance(scheme, EngineScheme) and scheme.activations != "float":
        text += f" with {scheme.activations} activations"
    return text if scheme.symmetric else f"{text}, with zero points"


def indivisible(scheme: WeightScheme | EngineScheme, shape: tuple[int, int]) -> str | None:
    """Return why groups do not divide the inputs of a matrix (N, K); None if they do."""
    group = group_of(scheme)
    if group is None or shape[1] % group == 0:
        return None
    fitting = [size for size in (128, 64, 32, 16) if size < group and shape[1] % size == 0]
    advice = f"groups of {' or '.join(map(str, fitting))} do" if fitting else "no size of groups does"
    return f"groups of {group} do not divide {shape[1]} inputs; {advice}"


def dominant(matrices: Sequence[CodedMatrix]) -> WeightScheme | EngineScheme:
    """Return the scheme that most matrices have; of several, the first."""
    counts: dict[str, int] = {}
    for matrix in matrices:
        counts[repr(matrix.scheme)] = counts.get(repr(matrix.scheme), 0) + 1
    return max((matrix.scheme for matrix in matrices), key=lambda scheme: counts[repr(scheme)])


def scale_shape(matrix: CodedMatrix) -> tuple[int, int]:
    """Return the shape of the scales: (N, groups), (N, 1), or (1, 1) for a scale per tensor."""
    outputs, inputs = matrix.shape
    group = group_of(matrix.scheme)
    if is_per_tensor(matrix.scheme):
        return (1, 1)
    return (outputs, 1 if group is None else inputs // group)


def is_per_tensor(scheme: WeightScheme | EngineScheme) -> bool:
    """Return whether all weights of a matrix share one scale; nvfp4 has scales of groups besides."""
    return isinstance(scheme, EngineScheme) and scheme.scale_per == "tensor"


def checked(matrix: CodedMatrix, codes: Codes) -> Codes:
    """Return `codes` if they have the shapes of the matrix, and scales that are finite and not 0.

    Scales of integers by group may be negative, so that the code of the largest magnitude of a group is the
    lowest one whatever its sign; servers only multiply by them. All others are positive.

    Raises:
        CheckpointError: A shape differs, or a scale is 0, not finite, or of a sign that it cannot have.
    """
    rows, width = codes.codes.shape
    per_byte = 8 // matrix.scheme.bits if codes.codes.dtype == np.uint8 else 1
    found = {"codes": (rows, width * per_byte), "scales": codes.scales.shape}
    if codes.zero_points is not None:
        found["zero points"] = codes.zero_points.shape
    for name, shape in found.items():
        declared = matrix.shape if name == "codes" else scale_shape(matrix)
        if shape != declared:
            raise CheckpointError(f"{matrix.module} has {name} of shape {list(shape)}, not {list(declared)}")
    if not matrix.scheme.symmetric and codes.zero_points is None:
        raise CheckpointError(f"{matrix.module} has no zero points, although its scheme is not symmetric")
    scales = codes.scales.astype(np.float32)
    values = [np.abs(scales) if isinstance(matrix.scheme, WeightScheme) else scales]
    values += [] if codes.whole is None else [np.asarray(codes.whole, np.float32).reshape(1, 1)]
    values += [] if matrix.input_scale is None else [np.full((1, 1), matrix.input_scale, np.float32)]
    if not all(bool((np.isfinite(value) & (value > 0)).all()) for value in values):
        raise CheckpointError(
            f"{matrix.module} has scales that are not positive finite numbers",
            hint="the checkpoint has values that are not finite, or quantization produced none",
        )
    if codes.codes.dtype == ml_dtypes.float8_e4m3fn and np.isnan(codes.codes.astype(np.float32)).any():
        raise CheckpointError(f"{matrix.module} has codes that are NaN", hint="the checkpoint is damaged")
    return codes


def stored_scales(matrix: CodedMatrix, scales: Array) -> Array:
    """Return scales in the type in which they are stored.

    Raises:
        CheckpointError: The type does not represent them exactly.
    """
    with np.errstate(over="ignore"):
        stored: Array = scales.astype(matrix.scale_type.numpy())
    if not np.array_equal(stored.astype(np.float32), scales.astype(np.float32)):
        largest = float(np.abs(scales.astype(np.float32)).max())
        raise CheckpointError(
            f"{matrix.module} has scales up to {largest:g} that {matrix.scale_type.name} does not represent "
            "exactly",
            hint=f"quantize with scales of type {matrix.scale_type.name}, or store them in another type",
        )
    return stored


def unsigned_codes(matrix: CodedMatrix, codes: Codes) -> Array:
    """Return integer codes as uint8 0..2**bits - 1, (N, K)."""
    bits = matrix.scheme.bits
    if codes.codes.dtype == np.uint8:
        return unpack(codes.codes, bits, matrix.shape[1])
    signed: Array = codes.codes.astype(np.int16) + np.int16(1 << (bits - 1))
    return signed.astype(np.uint8)


def code_words(matrix: CodedMatrix, codes: Codes) -> Array:
    """Return integer codes in words along the inputs as `pack_words` does, int32 (N, ceil(K * bits / 32))."""
    if codes.codes.dtype == np.uint8:
        return _words(codes.codes)
    return pack_words(unsigned_codes(matrix, codes), matrix.scheme.bits)


def pack_words(codes: Array, bits: int) -> Array:
    """Pack codes of 4 or 8 bits, uint8 (n, count), into words, low bits first; the last word ends with 0.

    Returns:
        int32 (n, ceil(count * bits / 32)).
    """
    return _words(pack(codes, bits))


def _words(octets: Array) -> Array:
    """Return bytes (n, count) as words int32 (n, ceil(count / 4)), the first byte lowest."""
    rows, count = octets.shape
    if count % 4:
        octets = np.concatenate([octets, np.zeros((rows, -count % 4), np.uint8)], axis=1)
    return np.ascontiguousarray(octets).view(np.dtype("<i4"))


def pack_halves(codes: Array) -> Array:
    """Pack float4_e2m1fn codes (N, K) into bytes (N, K / 2), the even input in the low half."""
    halves = codes.view(np.uint8) & np.uint8(15)
    packed: Array = halves[:, 0::2] | (halves[:, 1::2] << np.uint8(4))
    return packed


def open_name(module: str) -> str | None:
    """Return the name of a module from the list of layers on; None if it is in no list.

    What is before the list differs between the files, transformers and servers: the same layers are
    `language_model.model.layers`, `model.language_model.layers` and `model.layers`.
    """
    parts = module.split(".")
    numbered = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if numbered is None else ".".join(parts[max(numbered - 1, 0) :])


def name_patterns(matrices: Iterable[CodedMatrix], others: Iterable[str]) -> list[str]:
    """Return `re:` patterns that match the names of all `matrices`, and none of `others`.

    A pattern leaves open what is before the list of layers, and the numbers of layers and experts; where it
    would match one of `others`, the exact names stand in its place, in the folder and in transformers.
    Readers match a pattern from the start of a name, as `re.match`.
    """
    by_pattern: dict[str, list[CodedMatrix]] = {}
    for matrix in matrices:
        parts = (open_name(matrix.module) or matrix.module).split(".")
        tail = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts)
        by_pattern.setdefault(rf"(.*\.)?{tail}$", []).append(matrix)
    different = tuple(others)
    targets = []
    for pattern, members in by_pattern.items():
        matches = re.compile(pattern).match
        if len(members) > 1 and not any(map(matches, different)):
            targets.append(f"re:{pattern}")
        else:
            targets += [name for member in members for name in member.names]
    return targets
