"""Write tensors as safetensors files of limited size, one computation after the other.

Format: 8 bytes little-endian length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the
tensors without gaps (https://github.com/huggingface/safetensors#format). Readers map a file and need every
tensor at a multiple of its element size. All offsets are known in advance, so that the bytes are written and
digested in one go: a tensor whose size is not a multiple of 8 bytes would move those after it, and is kept in
memory until the end of its file. These are scalars and short vectors.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.artifact.manifest import FileDigest
from llmc.artifact.store.disk import require_space, space_errors
from llmc.backends.written import WrittenTensors
from llmc.errors import GraphError, ResourceError

#: Function called with the number of bytes written so far, and in total.
Progress = Callable[[int, int], None]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Largest size of the tensors of one file, in bytes, as transformers has it, unless one alone is larger.
FILE_BYTES = 5_000_000_000
_ALIGN = 8
_TYPES = {
    ir.DataType.DOUBLE: "F64",
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.FLOAT8E5M2: "F8_E5M2",
    ir.DataType.FLOAT8E8M0: "F8_E8M0",
    ir.DataType.INT64: "I64",
    ir.DataType.INT32: "I32",
    ir.DataType.INT16: "I16",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT64: "U64",
    ir.DataType.UINT32: "U32",
    ir.DataType.UINT16: "U16",
    ir.DataType.UINT8: "U8",
    ir.DataType.BOOL: "BOOL",
}


@dataclass(frozen=True)
class _Slot:
    """A tensor within a file."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)

    @property
    def is_aligned(self) -> bool:
        """Whether the tensor after it is aligned if it is."""
        return self.bytes % _ALIGN == 0


@dataclass
class _File:
    """One file: the computations that it holds, in order."""

    groups: list[WrittenTensors] = field(default_factory=list)
    bytes: int = 0

    def slots(self) -> list[_Slot]:
        """Return its tensors in the order of their bytes: unaligned ones last, those of wide types first."""
        slots = [slot for group in self.groups for slot in _slots_of(group)]
        rest = [slot for slot in slots if not slot.is_aligned]
        rest.sort(key=lambda slot: -int(slot.dtype.itemsize))
        return [slot for slot in slots if slot.is_aligned] + rest


def write_tensors(
    tensors: Sequence[WrittenTensors],
    folder: Path,
    progress: Progress | None = None,
    file_bytes: int = FILE_BYTES,
) -> dict[str, FileDigest]:
    """Write tensors into `folder` as model.safetensors, or as several files and their index.

    Two computations are in memory at a time: one that is written, and the next. The same tensors give the
    same bytes.

    Args:
        folder: An existing directory.
        file_bytes: Size of the tensors beyond which another file begins.

    Returns:
        Digest and size by file name.

    Raises:
        GraphError: A value differs from its declaration.
        ResourceError: Disk or memory ran out.
    """
    files = _cut(tensors, file_bytes)
    total = sum(file.bytes for file in files)
    names = [SINGLE] if len(files) == 1 else [_shard(i, len(files)) for i in range(len(files))]
    require_space(folder, total)
    digests: dict[str, FileDigest] = {}
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for name, file in zip(names, files, strict=True):
        with space_errors(folder / name), (folder / name).open("wb") as stream:
            digests[name] = _write_file(file, stream, advance)
    if len(files) > 1:
        placed = {s.name: n for n, file in zip(names, files, strict=True) for s in file.slots()}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        text = (json.dumps(index, indent=2) + "\n").encode()
        with space_errors(folder / INDEX):
            (folder / INDEX).write_bytes(text)
        digests[INDEX] = FileDigest(sha256=hashlib.sha256(text).hexdigest(), bytes=len(text))
    return digests


def _shard(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _slots_of(group: WrittenTensors) -> list[_Slot]:
    return [_Slot(name, dtype, shape) for name, (dtype, shape) in group.specs.items()]


def _cut(tensors: Sequence[WrittenTensors], file_bytes: int) -> list[_File]:
    """Assign computations to files, in order; those of one computation share a file."""
    files = [_File()]
    for group in tensors:
        size = sum(slot.bytes for slot in _slots_of(group))
        if files[-1].groups and files[-1].bytes + size > file_bytes:
            files.append(_File())
        files[-1].groups.append(group)
        files[-1].bytes += size
    return files


def _header(slots: Sequence[_Slot]) -> bytes:
    """Return the length of the header and the header, padded with spaces to a multiple of 8 bytes."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for slot in slots:
        offsets = [offset, offset + slot.bytes]
        fields[slot.name] = {"dtype": _TYPES[slot.dtype], "shape": slot.shape, "data_offsets": offsets}
        offset += slot.bytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _write_file(file: _File, stream: BinaryIO, advance: Callable[[int], None]) -> FileDigest:
    digest, size = hashlib.sha256(), 0

    def write(data: bytes | memoryview) -> None:
        nonlocal size
        stream.write(data)
        digest.update(data)
        size += len(data)

    slots = file.slots()
    write(_header(slots))
    held: dict[str, Array] = {}
    for group, parts in _compute_ahead(file.groups):
        for slot in _slots_of(group):
            for part in parts(slot):
                if slot.is_aligned:
                    write(_raw(part))
                    advance(part.nbytes)
                else:
                    held[slot.name] = part
    for slot in slots:
        if slot.name in held:
            part = held.pop(slot.name)
            write(_raw(part))
            advance(part.nbytes)
    return FileDigest(sha256=digest.hexdigest(), bytes=size)


#: Yields the values of one tensor of a computation, some rows at a time; an unaligned one whole.
_Parts = Callable[[_Slot], Iterator[Array]]


def _compute_ahead(groups: Sequence[WrittenTensors]) -> Iterator[tuple[WrittenTensors, _Parts]]:
    """Yield each computation with its values, while a thread computes the next one."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="llmc-tensors")
    futures: dict[int, Future[dict[str, Array]]] = {}

    def begin(index: int) -> None:
        if index < len(groups) and not _is_streamed(groups[index]):
            futures[index] = pool.submit(_values, groups[index])

    try:
        begin(0)
        for index, group in enumerate(groups):
            if _is_streamed(group):
                begin(index + 1)
                yield group, _streamed(group)
                continue
            values = futures.pop(index).result()
            begin(index + 1)
            yield group, _of_values(values)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _is_streamed(group: WrittenTensors) -> bool:
    return group.rows is not None and all(slot.is_aligned for slot in _slots_of(group))


def _streamed(group: WrittenTensors) -> _Parts:
    def parts(slot: _Slot) -> Iterator[Array]:
        if group.rows is None:
            return
        count = 0
        for rows in group.rows():
            _check(slot, rows, (len(rows), *slot.shape[1:]) if slot.shape else ())
            count += rows.nbytes
            yield rows
        if count != slot.bytes:
            raise GraphError(f"{slot.name} has {count} bytes, and {slot.bytes} are declared")

    return parts


def _of_values(values: dict[str, Array]) -> _Parts:
    def parts(slot: _Slot) -> Iterator[Array]:
        yield values.pop(slot.name)

    return parts


def _values(group: WrittenTensors) -> dict[str, Array]:
    """Compute the values of a group, and check them against their declaration."""
    try:
        values = dict(group.compute())
    except MemoryError as error:
        size = sum(slot.bytes for slot in _slots_of(group))
        raise ResourceError(
            f"out of memory while computing {next(iter(group.specs))} ({size:,} bytes)"
        ) from error
    for slot in _slots_of(group):
        if slot.name not in values:
            raise GraphError(f"the computation of {', '.join(group.specs)} gives no {slot.name}")
        _check(slot, values[slot.name], slot.shape)
    return values


def _check(slot: _Slot, array: Array, shape: tuple[int, ...]) -> None:
    dtype = slot.dtype.numpy()
    if array.shape != shape or array.dtype != dtype:
        raise GraphError(
            f"{slot.name} is computed as {array.dtype} {array.shape}, and {dtype} {shape} is declared"
        )


def _raw(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
