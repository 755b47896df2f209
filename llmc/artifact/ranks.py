"""Define the record of a checkpoint that is split over the ranks of tensor parallelism.

The folder `ranks` in the artifact has a file `model-rank-R-part-0.safetensors` for each rank. The names are
those that vLLM's loader of `sharded_state` looks for
(vllm/model_executor/model_loader/sharded_state_loader.py). `layout.json` states of every tensor in these
files of which boxes of which tensors of the artifact it is made. A box is a start and a size along each axis.
Beside them are copies of the artifact's own files, such as config.json, so that a server loads the folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from llmc.arrays import Array
from llmc.errors import CheckpointError
from llmc.records import Record
from llmc.strict_json import parse_json

#: The folder of the files of ranks. Servers read every safetensors file beside the whole weights.
RANKS = "ranks"
#: The file that states the layout.
LAYOUT = f"{RANKS}/layout.json"
#: Tensors up to this number of elements are repeated in the layout, so that every rank has them.
SMALL = 16

_MANIFEST = "manifest.json"

Axes = tuple[Annotated[int, Field(ge=0)], ...]


def rank_file(rank: int) -> str:
    """Return the path of the file of a rank, counted from 0, in the artifact."""
    return f"{RANKS}/model-rank-{rank}-part-0.safetensors"


class Piece(Record):
    """A box of a tensor of the folder, and its place in a tensor of a rank.

    Args:
        source: The tensor of the folder.
        start: First index along each axis of the source.
        size: Length along each axis of the source.
        at: First index along each axis of the rank's tensor. If that has another number of axes, both boxes
            have the same number of elements in the same order.
        extent: Length along each axis of the rank's tensor.
    """

    source: str
    start: Axes
    size: Axes
    at: Axes
    extent: Axes

    @property
    def box(self) -> tuple[slice, ...]:
        """The box in the source."""
        return boxed(self.start, self.size)

    @property
    def place(self) -> tuple[slice, ...]:
        """The box in the rank's tensor."""
        return boxed(self.at, self.extent)


class RankTensor(Record):
    """A tensor in the file of a rank.

    Args:
        dtype: Name of its element type, as numpy and ml_dtypes have it.
        pieces: The boxes that it is made of; elements that none covers are zero.
        values: Its elements in order, if no tensor of the folder has them; None otherwise.
    """

    dtype: str
    shape: Axes
    pieces: tuple[Piece, ...] = ()
    values: tuple[float, ...] | None = None


class SourceTensor(Record):
    """A tensor of the folder before it is split.

    Args:
        dtype: As in `RankTensor`.
        values: Its elements in order if it has at most `SMALL`; None otherwise.
    """

    dtype: str
    shape: Axes
    values: tuple[float, ...] | None = None


class RankLayout(Record):
    """How the tensors of a folder are split.

    Args:
        names: The library, with its version, whose model has the names of the ranks' tensors.
        tensors: Every tensor of the folder.
        ranks: The tensors of each rank's file, by name.
    """

    names: str
    tensors: dict[str, SourceTensor]
    ranks: tuple[dict[str, RankTensor], ...]

    def pieces(self, rank: int) -> Iterator[tuple[str, Piece]]:
        """Yield every piece of a rank, with the name of the tensor that it is part of."""
        for name, tensor in self.ranks[rank].items():
            for piece in tensor.pieces:
                yield name, piece


def read_layout(folder: Path) -> RankLayout | None:
    """Read the layout of a folder; None if it is not split.

    Raises:
        CheckpointError: The file is not such a layout.
    """
    file = folder / LAYOUT
    if not file.is_file():
        return None
    try:
        layout = RankLayout.model_validate(parse_json(file.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        raise CheckpointError(
            f"{file} is not a layout of ranks: {str(error).splitlines()[0]}", hint="build it again"
        ) from error
    for rank in range(len(layout.ranks)):
        for name, piece in layout.pieces(rank):
            _require_inside(file, name, piece, layout, rank)
    return layout


def beside(folder: Path) -> list[str]:
    """Return the names of the files that every copy of a checkpoint has beside its weights, sorted."""
    names = (file.name for file in folder.iterdir() if file.is_file())
    return sorted(name for name in names if ".safetensors" not in name and name != _MANIFEST)


def element_type(name: str) -> np.dtype[Any]:
    """Return the numpy type of an element type's name, including those of ml_dtypes."""
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


def small_values(array: Array) -> tuple[float, ...] | None:
    """Return the elements of a small tensor for the layout; None for others."""
    return tuple(array.reshape(-1).tolist()) if array.size <= SMALL else None


def boxed(start: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the index of a box."""
    return tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))


def _require_inside(file: Path, name: str, piece: Piece, layout: RankLayout, rank: int) -> None:
    """Check that both boxes of a piece lie in their tensors.

    Raises:
        CheckpointError: One does not.
    """
    source = layout.tensors.get(piece.source)
    whole = None if source is None else source.shape
    boxes: Mapping[str, Any] = {
        "start": (piece.start, piece.size, whole),
        "at": (piece.at, piece.extent, layout.ranks[rank][name].shape),
    }
    for start, size, shape in boxes.values():
        fits = shape is not None and len(shape) == len(start) == len(size)
        if not fits or any(a + n > m for a, n, m in zip(start, size, shape, strict=True)):
            raise CheckpointError(f"{file} takes {name} of rank {rank} from outside of {piece.source}")
    if math.prod(piece.size) != math.prod(piece.extent):
        raise CheckpointError(f"{file} gives {name} of rank {rank} a box of {piece.source} of another size")
