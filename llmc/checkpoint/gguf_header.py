"""The header of a GGUF file: architecture and tensor table, checked against the file's size.

Format: magic, version, counts, key/value pairs, tensor table, aligned data, little-endian
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). `gguf.GGUFReader` builds a numpy view
per string of the vocabulary, seconds for a usual one; this walks over them in milliseconds.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.errors import CheckpointError, UnsupportedError

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table.

    Args:
        shape: Slowest dimension first, as numpy has it; the file has it the other way round.
        type_id: ggml type, a `gguf.GGMLQuantizationType`.
        offset: First byte in the file.
        row_bytes: Bytes of all elements with one index along axis 0.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    row_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Args:
        metadata: Scalars and strings by key; arrays are left out.
        array_lengths: Elements of each array, by key.
        spans: First byte and end of each key/value pair in the file, key included.
        tensors: The tensor table in file order.
    """

    architecture: str
    metadata: dict[str, Any]
    array_lengths: dict[str, int]
    spans: dict[str, tuple[int, int]]
    tensors: tuple[GgufTensor, ...]

    @classmethod
    def parse(cls, file: Path) -> "GgufHeader":
        """Read the header of `file`.

        Raises:
            CheckpointError: Not a GGUF file, damaged, or shorter than its tensor table says.
            UnsupportedError: A version or a tensor type that is not read.
        """
        size = file.stat().st_size
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise CheckpointError(f"{file} is not a GGUF file (it does not start with GGUF)")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                cursor = _Cursor(blob, file)
                header = cls._parse(cursor)
        for tensor in header.tensors:
            end = tensor.offset + tensor.row_bytes * (tensor.shape[0] if tensor.shape else 1)
            if end > size:
                raise CheckpointError(
                    f"{file} is truncated: {tensor.name} ends at byte {end}, the file at {size}",
                    hint="download it again",
                )
        return header

    @classmethod
    def _parse(cls, cursor: "_Cursor") -> "GgufHeader":
        version, tensor_count, pair_count = cursor.unpack("IQQ")
        if version not in _VERSIONS:
            raise UnsupportedError(
                f"{cursor.file} is GGUF version {version}; read are {' and '.join(map(str, _VERSIONS))}"
            )
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(pair_count):
            start = cursor.position
            key = cursor.string()
            (kind,) = cursor.unpack("I")
            if kind == _ARRAY:
                lengths[key] = cursor.skip_array()
            else:
                metadata[key] = cursor.value(kind)
            spans[key] = (start, cursor.position)
        table = [cursor.table_entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not isinstance(alignment, int) or alignment <= 0:
            raise CheckpointError(f"{cursor.file} names no architecture, or an alignment that is none")
        data = -(-cursor.position // alignment) * alignment
        tensors = tuple(
            GgufTensor(name, shape, kind, data + offset, _row_bytes(cursor.file, name, shape, kind))
            for name, shape, kind, offset in table
        )
        return cls(architecture, metadata, lengths, spans, tensors)


class _Cursor:
    """A position in the header; every read beyond the end of the file is a `CheckpointError`."""

    def __init__(self, blob: mmap.mmap, file: Path) -> None:
        self.file = file
        self.position = 4
        self._blob = blob

    def unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        self._require(struct.calcsize(layout))
        values = struct.unpack_from(layout, self._blob, self.position)
        self.position += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        self._require(length)
        raw = self._blob[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged() from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise self._damaged()
        return self.unpack(_SCALARS[kind])[0]

    def skip_array(self) -> int:
        kind, count = self.unpack("IQ")
        if kind in _SCALARS:
            self._skip(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self._skip(self.unpack("Q")[0])
        elif kind == _ARRAY:
            for _ in range(count):
                self.skip_array()
        else:
            raise self._damaged()
        return int(count)

    def table_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (rank,) = self.unpack("I")
        if rank > _MAX_DIMENSIONS:
            raise self._damaged()
        shape = tuple(reversed(self.unpack(f"{rank}Q")))
        kind, offset = self.unpack("IQ")
        return name, shape, kind, offset

    def _skip(self, count: int) -> None:
        self._require(count)
        self.position += count

    def _require(self, count: int) -> None:
        if self.position + count > len(self._blob):
            raise CheckpointError(
                f"{self.file} is truncated or damaged within its header ({len(self._blob)} bytes)",
                hint="download it again",
            )

    def _damaged(self) -> CheckpointError:
        return CheckpointError(
            f"{self.file} has a damaged header at byte {self.position}", hint="download it again"
        )


def _row_bytes(file: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {int(t): sizes for t, sizes in GGML_QUANT_SIZES.items()}
    if kind not in known:
        raise UnsupportedError(
            f"{name} in {file} is of ggml type {kind}, which the installed gguf package does not have",
            hint="upgrade gguf, or use another quantization of the model",
        )
    block, block_bytes = known[kind]
    if block > 1 and (len(shape) < 2 or shape[-1] % block):
        raise CheckpointError(
            f"{name} in {file} has shape {list(shape)}, which {GGMLQuantizationType(kind).name} "
            f"cannot hold (blocks of {block} along the last axis)"
        )
    return math.prod(shape[1:]) // block * block_bytes
