"""Read the weights of an artifact back as floats, from its graph or from its files of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import LlmcError, ParityError

if TYPE_CHECKING:
    from llmc.backends.base import Backend
    from llmc.checkpoint import Checkpoint
    from llmc.graph.weights import Rows
    from llmc.validate.stored import Stored


def read_weights(folder: Path, backend: Backend, expected: Mapping[str, Rows]) -> dict[str, Stored]:
    """Return the weights of an artifact by the names of `expected`, without those in an unknown form.

    Args:
        expected: The rows that each weight of the lowered graph is computed from, by the name of its
            initializer before quantization.

    Raises:
        ParityError: A weight is missing, has another shape, or lies beyond the end of its file.
    """
    from llmc.validate.stored import read_stored
    from llmc.validate.stored_checkpoint import rows_of_store

    if backend.writes_graph:
        return read_stored(folder, expected)
    return rows_of_store(open_folder(folder).tensors, expected)


def open_folder(folder: Path) -> Checkpoint:
    """Open an artifact that is a checkpoint with llmc's own reader.

    Raises:
        ParityError: It cannot be read.
    """
    from llmc.checkpoint import open_checkpoint

    try:
        return open_checkpoint(str(folder))
    except LlmcError as error:
        raise ParityError(f"the checkpoint in {folder} cannot be read: {error.fact}") from error
