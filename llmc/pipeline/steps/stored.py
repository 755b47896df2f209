"""Read the weights of an artifact back as floats, from its graph or from its files of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.backends import backend_of
from llmc.errors import LlmcError, ParityError, UnsupportedError

if TYPE_CHECKING:
    from llmc.artifact.store.folder import Artifact
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


def require_graph(artifact: Artifact, purpose: str) -> None:
    """Refuse an artifact that is a checkpoint where a graph is needed.

    Args:
        purpose: What the graph is needed for, such as `llmc bench times`.

    Raises:
        UnsupportedError: It has no graph.
    """
    if not backend_of(artifact.manifest.target).writes_graph:
        raise UnsupportedError(
            f"{purpose} a graph, but {artifact.path} is a checkpoint that servers execute",
            hint="llmc verify measures a checkpoint; llmc run generates text with it",
        )


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
