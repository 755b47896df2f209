"""Write a graph with lazy weights as model.onnx and model.onnx.data."""

import hashlib
from contextlib import closing
from pathlib import Path

import onnx_ir as ir

from llmc.artifact.manifest import MODEL, FileDigest
from llmc.artifact.store.disk import require_space, space_errors
from llmc.backends.external import Batch, DataFile, Progress, compute_ahead, lay_out

DATA = "model.onnx.data"


def write_model(model: ir.Model, folder: Path, progress: Progress | None = None) -> dict[str, FileDigest]:
    """Write `model` as model.onnx, with its weights beside it in model.onnx.data.

    Each `WeightGroup` is computed once, two of them at a time, and released when it is written. Tensors below
    1 KiB stay inside of model.onnx; those in the data file begin at multiples of 64 bytes. The same model
    gives the same bytes. The model itself keeps its lazy weights.

    Args:
        folder: An existing directory.
        progress: Function called after each tensor with the number of bytes written so far, and in total.

    Returns:
        Digest and size by file name; model.onnx.data only if there is one.

    Raises:
        GraphError: A weight is not computed, or differs from the graph's declaration; it is named.
        ResourceError: Disk or memory ran out.
    """
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    batches, size = lay_out(values)
    files: dict[str, FileDigest] = {}
    originals = [(slot.value, slot.tensor) for batch in batches for slot in batch.slots]
    with space_errors(folder / DATA):
        require_space(folder, size)
        try:
            with (folder / DATA).open("wb") as file:
                files[DATA] = _write_weights(batches, size, DataFile(file), folder, progress)
            if not size:
                (folder / DATA).unlink()
                del files[DATA]
            files[MODEL] = _write_graph(model, folder / MODEL)
        finally:
            for value, tensor in originals:
                value.const_value = tensor
    return files


def _write_weights(
    batches: tuple[Batch, ...], size: int, data: DataFile, folder: Path, progress: Progress | None
) -> FileDigest:
    """Write all weights, and leave each initializer with the form that model.onnx records."""
    with closing(compute_ahead(batches)) as computed:
        for slot, array in computed:
            tensor, name = slot.tensor, str(slot.value.name)
            if slot.offset is None:
                slot.value.const_value = ir.tensor(array, dtype=tensor.dtype, name=name)
                continue
            data.append(slot, array)
            slot.value.const_value = ir.ExternalTensor(
                DATA,
                slot.offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=folder,
            )
            if progress is not None:
                progress(slot.offset + tensor.nbytes, size)
    return data.digest()


def _write_graph(model: ir.Model, path: Path) -> FileDigest:
    text = ir.to_proto(model).SerializeToString(deterministic=True)
    path.write_bytes(text)
    return FileDigest(sha256=hashlib.sha256(text).hexdigest(), bytes=len(text))
