"""Write the file of every rank of tensor parallelism from the whole weights of a folder, tensor by tensor."""

import hashlib
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.artifact.manifest import FileDigest
from llmc.artifact.ranks import LAYOUT, RANKS, Piece, RankLayout, RankTensor, beside, element_type, rank_file
from llmc.backends.checkpoint.writer import SINGLE, Progress, write_tensors
from llmc.backends.written import WrittenTensors
from llmc.graph.weights import WeightStore


def write_ranks(
    folder: Path, layout: RankLayout, whole: WeightStore, progress: Progress | None = None
) -> dict[str, FileDigest]:
    """Write the folder `ranks`: a file for every rank, the layout, and copies of what is beside the weights.

    Two tensors of a rank are in memory at a time.

    Args:
        folder: The folder of the whole weights, without its manifest.
        whole: These weights, under the names in their files.
        progress: Called with the bytes that are written of the current file, and in total.

    Returns:
        Digest and size of weights and layout, by path in the folder.

    Raises:
        ResourceError: Disk or memory ran out.
        CheckpointError: The whole weights are damaged.
    """
    digests: dict[str, FileDigest] = {}
    (folder / RANKS).mkdir()
    for rank, tensors in enumerate(layout.ranks):
        with TemporaryDirectory(dir=folder, prefix=".rank-") as scratch:
            parts = [_part(name, tensor, whole) for name, tensor in tensors.items()]
            written = write_tensors(parts, Path(scratch), progress, file_bytes=sys.maxsize)
            (Path(scratch) / SINGLE).replace(folder / rank_file(rank))
        digests[rank_file(rank)] = written[SINGLE]
    for name in beside(folder):
        shutil.copyfile(folder / name, folder / RANKS / name)
    text = (layout.model_dump_json() + "\n").encode()
    (folder / LAYOUT).write_bytes(text)
    digests[LAYOUT] = FileDigest(sha256=hashlib.sha256(text).hexdigest(), bytes=len(text))
    return digests


def _part(name: str, tensor: RankTensor, whole: WeightStore) -> WrittenTensors:
    spec = (ir.DataType.from_numpy(element_type(tensor.dtype)), tensor.shape)
    return WrittenTensors({name: spec}, partial(_values, name, tensor, whole))


def _values(name: str, tensor: RankTensor, whole: WeightStore) -> Mapping[str, Array]:
    dtype = element_type(tensor.dtype)
    if tensor.values is not None:
        return {name: np.array(tensor.values).astype(dtype).reshape(tensor.shape)}
    values = np.zeros(tensor.shape, dtype)
    for piece in tensor.pieces:
        values[piece.place] = _box(piece, whole)
    return {name: values}


def _box(piece: Piece, whole: WeightStore) -> Array:
    """Read a box of a tensor in the shape that it has in the rank's tensor; only its rows are read."""
    if not piece.start:
        return whole.read(piece.source)
    rows = whole.read(piece.source, piece.start[0], piece.start[0] + piece.size[0])
    box: Array = rows[:, *piece.box[1:]].reshape(piece.extent)
    return box
