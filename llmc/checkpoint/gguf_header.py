"""Read the header of a GGUF model: architecture and tensor table, checked against the file sizes.

Format: magic, version, counts, key/value pairs, tensor table, aligned data, little-endian
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). `gguf.GGUFReader` builds a numpy view for every
string of the vocabulary, which takes seconds; this reader skips over the strings in milliseconds.
"""

import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.checkpoint.gguf_parts import all_parts
from llmc.checkpoint.gguf_types import check_types
from llmc.checkpoint.pointer import refuse_pointer
from llmc.errors import CheckpointError, UnsupportedError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 8
_KEPT_ELEMENTS = 4096  # longest numeric array kept in the parsed metadata, e.g. one value per layer
_SPLIT_NO, _SPLIT_COUNT, _SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table.

    Args:
        shape: Slowest dimension first, as in numpy; the file has the reverse order.
        type_id: ggml type, a value of `gguf.GGMLQuantizationType`.
        file: The file that holds the values; one of the model's parts.
        offset: First byte of the values in that file.
        row_bytes: Bytes of all elements with the same index along axis 0.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    file: Path
    offset: int
    row_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF model that consists of one file or several parts.

    Args:
        metadata: Scalars, strings and short numeric arrays by key; other arrays are left out.
        array_lengths: Number of elements of each array, by key.
        spans: First byte and end of each key/value pair in the first file, including the key.
        tensors: The tensor tables, in file order.
        files: The files of the model, in order.
    """

    architecture: str
    metadata: dict[str, Any]
    array_lengths: dict[str, int]
    spans: dict[str, tuple[int, int]]
    tensors: tuple[GgufTensor, ...]
    files: tuple[Path, ...]

    @classmethod
    def parse(cls, file: Path) -> "GgufHeader":
        """Read the header of `file`, and the headers of the other parts if the model is split.

        Raises:
            CheckpointError: The file is not a GGUF file, is damaged, is shorter than its tensor table says,
                or is a part whose other parts are missing or belong to another model.
            UnsupportedError: The version, the byte order or a tensor type is not supported.
        """
        requested = _Part.read(file)
        count = requested.metadata.get(_SPLIT_COUNT, 1)
        parts = [requested] if count in (0, 1) else _read_set(requested)
        first = parts[0]
        architecture = first.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(f"{first.file} names no architecture", hint="download it again")
        check_types(first.file, architecture, first.metadata)
        tensors = tuple(tensor for part in parts for tensor in part.tensors)
        repeated = [name for name, n in Counter(t.name for t in tensors).items() if n > 1]
        if repeated:
            raise CheckpointError(f"{first.file} has tensor {repeated[0]} twice", hint="download it again")
        return cls(
            architecture,
            first.metadata,
            first.array_lengths,
            first.spans,
            tensors,
            tuple(part.file for part in parts),
        )

    def value(self, key: str) -> Any:
        """Return the value of `KEY` or `ARCHITECTURE.KEY`; None if the file does not state it."""
        return self.metadata.get(key, self.metadata.get(f"{self.architecture}.{key}"))

    def states(self, key: str) -> bool:
        """Return whether the file has `key`, including arrays."""
        return key in self.metadata or key in self.array_lengths

    def array(self, key: str) -> list[Any]:
        """Return all elements of the array under `key`; empty if the file does not have it."""
        if key not in self.array_lengths:
            return []
        with _mapped(self.files[0]) as blob:
            cursor = _Cursor(blob, self.files[0], self.spans[key][0])
            cursor.string()
            cursor.unpack("I")
            return cursor.array()


@dataclass(frozen=True)
class _Part:
    """The header of one file."""

    file: Path
    metadata: dict[str, Any]
    array_lengths: dict[str, int]
    spans: dict[str, tuple[int, int]]
    tensors: tuple[GgufTensor, ...]

    @classmethod
    def read(cls, file: Path) -> "_Part":
        with _mapped(file) as blob:
            part = cls._parse(_Cursor(blob, file, len(_MAGIC)))
            size = len(blob)
        for tensor in part.tensors:
            end = tensor.offset + tensor.row_bytes * (tensor.shape[0] if tensor.shape else 1)
            if end > size:
                raise CheckpointError(
                    f"{file} is truncated: {tensor.name} ends at byte {end}, the file at {size}",
                    hint="download it again",
                )
        return part

    @classmethod
    def _parse(cls, cursor: "_Cursor") -> "_Part":
        _check_version(cursor.file, cursor.unpack("I")[0])
        tensor_count, pair_count = cursor.unpack("QQ")
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(pair_count):
            start = cursor.position
            key = cursor.string()
            (kind,) = cursor.unpack("I")
            if kind == _ARRAY:
                at = cursor.position
                lengths[key] = cursor.skip_array()
                if lengths[key] <= _KEPT_ELEMENTS:
                    metadata |= cursor.short_array(key, at)
            else:
                metadata[key] = cursor.value(kind)
            spans[key] = (start, cursor.position)
        table = [cursor.table_entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise CheckpointError(f"{cursor.file} has a general.alignment of {alignment!r}")
        data = -(-cursor.position // alignment) * alignment
        file = cursor.file
        tensors = tuple(
            GgufTensor(name, shape, kind, file, data + offset, _row_bytes(file, name, shape, kind))
            for name, shape, kind, offset in table
        )
        return cls(file, metadata, lengths, spans, tensors)


def _read_set(requested: _Part) -> list[_Part]:
    """Read the other parts of the model and check that all parts belong together."""
    files = all_parts(requested.file)
    parts = [requested if file == requested.file else _Part.read(file) for file in files]
    for number, part in enumerate(parts):
        stated = (part.metadata.get(_SPLIT_NO), part.metadata.get(_SPLIT_COUNT))
        if stated != (number, len(files)):
            raise CheckpointError(
                f"{part.file} is part {stated[0]} of {stated[1]} by split.no (from 0) and split.count, "
                f"and part {number} of {len(files)} by its name",
                hint="restore the published names of all parts",
            )
    total = parts[0].metadata.get(_SPLIT_TENSORS)
    tensor_count = sum(len(part.tensors) for part in parts)
    if total is not None and total != tensor_count:
        raise CheckpointError(
            f"{parts[0].file} is split, its {len(files)} parts have {tensor_count} tensors, "
            f"and split.tensors.count is {total}",
            hint="download all parts again; they must belong to the same model",
        )
    return parts


def _check_version(file: Path, version: int) -> None:
    if version in _VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
        raise UnsupportedError(
            f"{file} is a big-endian GGUF file, and only little-endian ones are read",
            hint="convert it with gguf-convert-endian of the gguf package, or take a little-endian file",
        )
    raise UnsupportedError(
        f"{file} is GGUF version {version}; supported are {' and '.join(map(str, _VERSIONS))}",
        hint="convert the original model again with a current llama.cpp"
        if version == 1
        else "upgrade llmc, or take a file of an earlier version",
    )


@contextmanager
def _mapped(file: Path) -> Iterator[mmap.mmap]:
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            refuse_pointer(file)
            raise CheckpointError(
                f"{file} is not a GGUF file (it does not start with GGUF)", hint="download it again"
            )
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as blob:
            yield blob


class _Cursor:
    """A position in the header; reading beyond the end of the file raises `CheckpointError`."""

    def __init__(self, blob: mmap.mmap, file: Path, position: int) -> None:
        self.file = file
        self.position = position
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

    def short_array(self, key: str, at: int) -> dict[str, Any]:
        """Read the numeric array that begins at byte `at`; return nothing for strings and nested arrays."""
        after, self.position = self.position, at
        (kind,) = self.unpack("I")
        self.position = at
        values = {key: self.array()} if kind in _SCALARS else {}
        self.position = after
        return values

    def array(self) -> list[Any]:
        kind, count = self.unpack("IQ")
        if kind in _SCALARS:
            return list(self.unpack(f"{count}{_SCALARS[kind]}"))
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        raise self._damaged()

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

    sizes_by_type = {int(t): sizes for t, sizes in GGML_QUANT_SIZES.items()}
    if kind not in sizes_by_type:
        raise UnsupportedError(
            f"{name} in {file} is of ggml type {kind}, which the installed gguf package does not have",
            hint="upgrade gguf, or use another quantization of the model",
        )
    block, block_bytes = sizes_by_type[kind]
    if block > 1 and (len(shape) < 2 or shape[-1] % block):
        raise CheckpointError(
            f"{name} in {file} has shape {list(shape)}, which {GGMLQuantizationType(kind).name} "
            f"cannot hold (blocks of {block} along the last axis)"
        )
    return math.prod(shape[1:]) // block * block_bytes
