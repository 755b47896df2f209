"""Read the tensors of a folder from the files of its ranks, and compare these with the whole weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.artifact.ranks import (
    LAYOUT,
    RANKS,
    Piece,
    RankLayout,
    RankTensor,
    SourceTensor,
    beside,
    element_type,
    rank_file,
    read_layout,
)
from llmc.checkpoint.ranges import row_range
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.errors import CheckpointError
from llmc.graph.weights import TensorInfo, WeightStore

#: Bytes that a comparison reads at a time.
_CHUNK = 16 << 20


class RankStore:
    """A `WeightStore` with the names and shapes of the whole folder, over the files of some ranks only.

    What these ranks do not have is read as zeros. So a reader of quantized folders needs to know nothing of
    ranks: it reads the rows of a matrix, and what lies in the rank's box is right.

    Args:
        stores: The files of the ranks, by rank.
    """

    def __init__(self, layout: RankLayout, stores: Mapping[int, SafetensorsStore]) -> None:
        self.files = tuple(file for store in stores.values() for file in store.files)
        self.notes: tuple[str, ...] = ()
        self.layout, self._stores = layout, stores
        self._places: dict[str, list[tuple[int, str, Piece]]] = {}
        for rank in stores:
            for name, piece in layout.pieces(rank):
                self._places.setdefault(piece.source, []).append((rank, name, piece))
        self._infos = MappingProxyType(
            {
                name: TensorInfo(name, each.shape, ir.DataType.from_numpy(element_type(each.dtype)))
                for name, each in layout.tensors.items()
            }
        )

    @classmethod
    def open(cls, folder: Path, ranks: Sequence[int] | None = None) -> RankStore:
        """Open the files of ranks.

        Args:
            ranks: The ranks; None for all.

        Raises:
            CheckpointError: The folder is not split, a file is missing or damaged, or does not have the
                tensors that the layout states.
        """
        layout = read_layout(folder)
        if layout is None:
            raise CheckpointError(
                f"{folder} is not split: it has no {LAYOUT}", hint="build it with llmc build --shards N"
            )
        every = range(len(layout.ranks)) if ranks is None else ranks
        return cls(layout, {rank: _open_rank(folder, layout, rank) for rank in every})

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        tensor = self.layout.tensors[name]
        low, high = row_range(tensor.shape, start, stop)
        if tensor.values is not None:
            whole = np.array(tensor.values).astype(element_type(tensor.dtype)).reshape(tensor.shape)
            return whole[low:high] if tensor.shape else whole
        found = np.zeros((high - low, *tensor.shape[1:]), element_type(tensor.dtype))
        for rank, own, piece in self._places.get(name, ()):
            first, last = max(low, piece.start[0]), min(high, piece.start[0] + piece.size[0])
            if first < last:
                rows = _rows(self._stores[rank], own, piece, first - piece.start[0], last - piece.start[0])
                found[first - low : last - low, *piece.box[1:]] = rows
        return found


def _rows(store: SafetensorsStore, name: str, piece: Piece, start: int, stop: int) -> Array:
    """Read rows of a piece's box, counted from its first, in the shape that they have in the source."""
    if piece.size != piece.extent:
        return store.read(name)[piece.place].reshape(piece.size)[start:stop]
    rows: Array = store.read(name, piece.at[0] + start, piece.at[0] + stop)[:, *piece.place[1:]]
    return rows


def _open_rank(folder: Path, layout: RankLayout, rank: int) -> SafetensorsStore:
    file = folder / rank_file(rank)
    if not file.is_file():
        raise CheckpointError(f"{folder} lacks {file.name}, the file of rank {rank}", hint="build it again")
    store = SafetensorsStore.open_file(file)
    stated = {name: (each.shape, element_type(each.dtype)) for name, each in layout.ranks[rank].items()}
    found = {name: (info.shape, info.dtype.numpy()) for name, info in store.infos().items()}
    if stated != found:
        wrong = next(name for name in (*stated, *found) if stated.get(name) != found.get(name))
        raise CheckpointError(
            f"{file} does not have {wrong} as {LAYOUT} states it", hint="build it again, or copy it again"
        )
    return store


def find_differences(folder: Path, whole: WeightStore) -> Iterator[str]:
    """Describe as one sentence each what a rank's file does not have from the whole weights.

    These are tensors with other bytes, elements that the layout leaves at zero and that are not zero, what
    the layout states otherwise than the weights have it, and files that a build does not write: servers read
    every part of a rank that they find. Tensors are read some rows at a time.

    Raises:
        CheckpointError: As `RankStore.open`.
    """
    layout = RankStore.open(folder).layout  # opens and checks every file
    differing = {name for name in (*whole.infos(), *layout.tensors) if not _stated(name, layout, whole)}
    yield from (f"{LAYOUT} does not state {name} as the weights have it" for name in sorted(differing))
    yield from _other_files(folder, layout)
    for rank, tensors in enumerate(layout.ranks):
        store = _open_rank(folder, layout, rank)
        for name, tensor in tensors.items():
            comparable = differing.isdisjoint(piece.source for piece in tensor.pieces)
            if not comparable or not _equal(name, tensor, store, whole, layout.tensors):
                yield f"rank {rank} has another {name} than the whole weights"


def _stated(name: str, layout: RankLayout, whole: WeightStore) -> bool:
    """Return whether the layout states a tensor, and its values if it has them, as the weights do."""
    stated, info = layout.tensors.get(name), whole.infos().get(name)
    if stated is None or info is None:
        return False
    dtype = element_type(stated.dtype)
    if (stated.shape, dtype) != (info.shape, info.dtype.numpy()):
        return False
    return (
        stated.values is None or np.array(stated.values).astype(dtype).tobytes() == whole.read(name).tobytes()
    )


def _other_files(folder: Path, layout: RankLayout) -> Iterator[str]:
    """Describe copies that are not the artifact's own files, and files that a build does not write."""
    copies = beside(folder)
    for name in copies:
        copy = folder / RANKS / name
        if not copy.is_file() or copy.read_bytes() != (folder / name).read_bytes():
            yield f"{RANKS}/{name} is not the artifact's own"
    known = {f"{RANKS}/{name}" for name in copies} | {rank_file(rank) for rank in range(len(layout.ranks))}
    for file in sorted((folder / RANKS).iterdir()):
        if f"{RANKS}/{file.name}" not in known | {LAYOUT}:
            yield f"{RANKS}/{file.name} is not written by a build"


def _equal(
    name: str,
    tensor: RankTensor,
    store: SafetensorsStore,
    whole: WeightStore,
    sources: Mapping[str, SourceTensor],
) -> bool:
    if tensor.values is not None:
        stated = np.array(tensor.values).astype(element_type(tensor.dtype))
        return stated.tobytes() == store.read(name).tobytes()
    same = all(
        ours.tobytes() == theirs.tobytes()
        for piece in tensor.pieces
        for ours, theirs in _both(name, piece, store, whole, len(sources[piece.source].shape))
    )
    return same and _zero_between(name, tensor, store)


def _zero_between(name: str, tensor: RankTensor, store: SafetensorsStore) -> bool:
    """Return whether the elements of a rank's tensor that no piece covers are zero."""
    if sum(math.prod(piece.extent) for piece in tensor.pieces) == math.prod(tensor.shape):
        return True
    rest = np.array(store.read(name))
    for piece in tensor.pieces:
        rest[piece.place] = 0
    return not any(rest.tobytes())


def _both(
    name: str, piece: Piece, store: SafetensorsStore, whole: WeightStore, axes: int
) -> Iterator[tuple[Array, Array]]:
    """Yield the elements of a piece in the rank's file and in the whole weights, some rows at a time."""
    if axes == 0 or piece.size != piece.extent:
        yield store.read(name)[piece.place], whole.read(piece.source)[piece.box]
        return
    info = whole.infos()[piece.source]
    width = info.dtype.numpy().itemsize * max(1, int(np.prod(info.shape[1:])))
    step = max(1, _CHUNK // width)
    for first in range(0, piece.size[0], step):
        last = min(first + step, piece.size[0])
        theirs = whole.read(piece.source, piece.start[0] + first, piece.start[0] + last)
        yield _rows(store, name, piece, first, last), theirs[:, *piece.box[1:]]
