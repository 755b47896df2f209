"""Compute weights and write them into a file of external data at the same time.

Two threads compute ahead of the writer, limited to a few groups and a number of bytes: both cores are used,
and memory does not grow with the model. Offsets and lengths are known in advance from shapes and types; the
format is ONNX's (docs/ExternalData.md).
"""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.artifact.manifest import FileDigest
from llmc.errors import GraphError, LlmcError, ResourceError
from llmc.graph.weights import LazyWeight

#: Function called after each tensor with the number of bytes written so far, and in total.
Progress = Callable[[int, int], None]

#: Tensors below this size stay in the model, where shape inference and constant folding can read them.
_INLINE_BYTES = 1024
#: Alignment of tensors: a cache line. ONNX Runtime maps the file at any such offset; page
#: alignment changed neither its load time nor its memory (1.31.1, Linux).
_ALIGN = 64
_WORKERS = 2
_GROUPS_AHEAD = 3
_BYTES_AHEAD = 256 << 20


@dataclass(frozen=True)
class Slot:
    """An initializer and its place in the data file; `offset` is None if it stays in the model."""

    value: ir.Value
    tensor: ir.TensorProtocol
    offset: int | None


@dataclass(frozen=True)
class Batch:
    """Initializers that result from one computation, in the order in which they are written."""

    slots: tuple[Slot, ...]

    @property
    def bytes(self) -> int:
        return sum(slot.tensor.nbytes for slot in self.slots)

    @property
    def name(self) -> str:
        return ", ".join(str(slot.value.name) for slot in self.slots)


def lay_out(values: Sequence[ir.Value]) -> tuple[tuple[Batch, ...], int]:
    """Assign every initializer its place.

    Args:
        values: Initializers in the order in which to write them; members of one `WeightGroup` follow the
            first of them. Small ones that already have data are left out.

    Returns:
        The batches in order, and the size of the data file in bytes.
    """
    members: dict[int, list[tuple[ir.Value, ir.TensorProtocol]]] = {}
    for value in values:
        tensor = value.const_value
        if tensor is None:
            raise GraphError(f"initializer {value.name} has no data")
        lazy = isinstance(tensor, LazyWeight)
        if lazy or (tensor.dtype != ir.DataType.STRING and tensor.nbytes >= _INLINE_BYTES):
            key = id(tensor.group) if isinstance(tensor, LazyWeight) else id(value)
            members.setdefault(key, []).append((value, tensor))
    end = 0
    batches = []
    for group in members.values():
        slots = []
        for value, tensor in group:
            size = tensor.nbytes
            if size < _INLINE_BYTES:
                slots.append(Slot(value, tensor, None))
                continue
            offset = -(-end // _ALIGN) * _ALIGN
            slots.append(Slot(value, tensor, offset))
            end = offset + size
        batches.append(Batch(tuple(slots)))
    return tuple(batches), end


def compute_ahead(batches: Sequence[Batch]) -> Generator[tuple[Slot, Array]]:
    """Yield the data of every slot, in order, while two threads compute the next ones.

    Raises:
        GraphError: A weight was not computed, or differs from its declaration.
        ResourceError: Memory ran out.
    """
    waiting = deque(batches)
    ahead: deque[tuple[Batch, Future[tuple[Array, ...]]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="llmc-weights")
    try:
        while waiting or ahead:
            while waiting and (
                not ahead or (len(ahead) < _GROUPS_AHEAD and held + waiting[0].bytes <= _BYTES_AHEAD)
            ):
                batch = waiting.popleft()
                held += batch.bytes
                ahead.append((batch, pool.submit(_compute, batch)))
            batch, future = ahead[0]
            yield from zip(batch.slots, future.result(), strict=True)
            del future
            ahead.popleft()
            held -= batch.bytes
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class DataFile:
    """The data file while it is written: appends tensors at their offsets and digests the bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._end = 0

    def append(self, slot: Slot, array: Array) -> None:
        """Write the tensor of `slot`, after zeros up to its offset."""
        if slot.offset is None or slot.offset < self._end:
            raise GraphError(f"weight {slot.value.name} has no place after byte {self._end} of the data file")
        self._write(bytes(slot.offset - self._end))
        self._write(_raw(array, slot.tensor.dtype))

    def digest(self) -> FileDigest:
        """Return the digest of everything written so far."""
        return FileDigest(sha256=self._digest.hexdigest(), bytes=self._end)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._end += len(data)


def _compute(batch: Batch) -> tuple[Array, ...]:
    tensor = batch.slots[0].tensor
    try:
        if isinstance(tensor, LazyWeight):
            results = tensor.group.compute()
            arrays = tuple(_member(results, slot) for slot in batch.slots)
        else:
            arrays = (tensor.numpy(),)
    except LlmcError as error:
        raise type(error)(f"weight {batch.name}: {error.fact}", hint=error.hint) from error
    except MemoryError as error:
        raise ResourceError(
            f"out of memory while computing weight {batch.name} ({batch.bytes:,} bytes)"
        ) from error
    except Exception as error:
        raise GraphError(
            f"weight {batch.name} cannot be computed: {type(error).__name__}: {error}"
        ) from error
    for slot, array in zip(batch.slots, arrays, strict=True):
        _check(slot, array)
    return arrays


def _member(results: Mapping[str, Array], slot: Slot) -> Array:
    key = slot.tensor.key if isinstance(slot.tensor, LazyWeight) else ""
    if key not in results:
        raise GraphError(f"its computation gives {', '.join(sorted(results))}, but not '{key}'")
    return results[key]


def _check(slot: Slot, array: Array) -> None:
    shape, dtype = tuple(slot.tensor.shape.numpy()), slot.tensor.dtype.numpy()
    if array.shape != shape or array.dtype != dtype:
        raise GraphError(
            f"weight {slot.value.name} is computed as {array.dtype} {array.shape}; "
            f"the graph declares {dtype} {shape}"
        )


def _raw(array: Array, dtype: ir.DataType) -> bytes | memoryview:
    if dtype.bitwidth < 8:
        return ir.tensor(array, dtype=dtype).tobytes()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
