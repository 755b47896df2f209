"""Store the decisions of pruning in the artifact, so that the same weights can be computed again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.artifact.manifest import PRUNING
from llmc.artifact.store.disk import space_errors
from llmc.errors import ParityError

if TYPE_CHECKING:
    from llmc.arrays import Array


def write_decisions(
    decisions: Mapping[str, Array], influence: Sequence[float], folder: Path, reports: Path
) -> None:
    """Write the decisions beside the graph, and the influence of layers among the reports.

    Args:
        decisions: Remaining indices, int64 (remaining,), by the name of what they index.
        influence: How much each layer of the original turns the hidden states; empty if it was not measured.

    Raises:
        ResourceError: The disk is full.
    """
    from safetensors.numpy import save

    with space_errors(folder):
        (folder / PRUNING).parent.mkdir(exist_ok=True)
        (folder / PRUNING).write_bytes(save(dict(decisions)))
        if influence:
            text = json.dumps({"influence": influence}, indent=2)
            (reports / "pruning.json").write_text(text + "\n", encoding="utf-8")


def read_decisions(folder: Path) -> dict[str, Array]:
    """Read the decisions that `write_decisions` wrote.

    Raises:
        ParityError: The file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        decisions: dict[str, Array] = load_file(folder / PRUNING)
    except (OSError, SafetensorError) as error:
        raise ParityError(
            f"{folder / PRUNING}, which records how the model was pruned, cannot be read: {error}",
            hint="build the artifact again",
        ) from error
    return decisions
