"""Run an artifact that is a checkpoint in transformers, as a session."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import CheckpointError, ParityError
from llmc.pipeline.steps.original import is_large
from llmc.pipeline.steps.stored import open_folder
from llmc.validate.ahead import AheadSession
from llmc.validate.torch_session import TorchSession

if TYPE_CHECKING:
    from llmc.checkpoint.served import LoadedFolder
    from llmc.graph.interface import Interface
    from llmc.validate.positions import ReferencePass


class FolderSession(TorchSession):
    """A session of a folder that transformers loaded.

    Args:
        loaded: The folder.
        interface: The interface of the graph that its model was traced to.
    """

    def __init__(self, loaded: LoadedFolder, interface: Interface) -> None:
        where = "; ".join(filter(None, [f"{loaded.library}, float32", loaded.note]))
        super().__init__(loaded.model, interface, where)
        self.problems = loaded.problems
        self.fine = loaded.fine
        self.rounding = loaded.cache


class KnownTextsSession(AheadSession):
    """A session of a folder for texts that are known in advance, each of which it runs once.

    Args:
        loaded: The folder.
        interface: As for `FolderSession`.
        texts: As for `AheadSession`.
    """

    def __init__(self, loaded: LoadedFolder, interface: Interface, texts: Sequence[ReferencePass]) -> None:
        where = "; ".join(filter(None, [f"{loaded.library}, float32", loaded.note]))
        super().__init__(loaded.model, interface, where, texts)
        self.problems = loaded.problems
        self.fine = loaded.fine
        self.rounding = loaded.cache


def open_folder_session(
    folder: Path,
    interface: Interface,
    *,
    exact: bool,
    rounds_cache: bool = False,
    texts: Sequence[ReferencePass] = (),
) -> FolderSession | KnownTextsSession:
    """Load the checkpoint in `folder`, whole if it fits into memory, otherwise layer by layer.

    Args:
        interface: The interface that the manifest states.
        exact: Whether activations stay in float, so that the artifact's weights are all that is rounded.
        rounds_cache: Whether keys and values are rounded as the folder declares, if it does.
        texts: Everything that the session will be fed; empty if that is not known. A model that is read layer
            by layer, or has states of fixed size, then runs each text once.

    Raises:
        ParityError: The folder cannot be read, or transformers cannot load it.
        ResourceError: The package that reads the format is not installed.
    """
    from llmc.checkpoint.served import load_served, stream_served

    checkpoint = open_folder(folder)
    try:
        large = is_large(checkpoint)
        if large:
            loaded = stream_served(checkpoint, quantize_activations=not exact, quantize_cache=rounds_cache)
        else:
            loaded = load_served(checkpoint, quantize_activations=not exact, quantize_cache=rounds_cache)
    except CheckpointError as error:
        raise ParityError(error.fact) from error
    if texts and (large or interface.states):
        return KnownTextsSession(loaded, interface, texts)
    return FolderSession(loaded, interface)
