"""Describe the tensors that a build writes into a checkpoint artifact, to compute and compare them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from llmc.arrays import Array
from llmc.graph.files import FileTensors
from llmc.graph.weights import WeightStore


@dataclass(frozen=True)
class WrittenTensors:
    """Tensors of a checkpoint artifact that one computation gives, such as the parts of a quantized matrix.

    Args:
        specs: Element type and shape of each tensor, by its name in the files.
        compute: Returns every tensor of `specs` by its name.
        weight: Name of the graph's matrix before quantization, whose codes a build may take from calibration;
            None for tensors that the checkpoint alone determines.
        rows: Yields the rows of its only tensor, a few MiB at a time, where that takes less memory; None if
            it does not.
    """

    specs: Mapping[str, tuple[ir.DataType, tuple[int, ...]]]
    compute: Callable[[], Mapping[str, Array]]
    weight: str | None = None
    rows: Callable[[], Iterator[Array]] | None = None


class WrittenFrom(Protocol):
    """What a backend reads of the checkpoint that it writes again in another form."""

    @property
    def path(self) -> Path:
        """The Hugging Face folder or the GGUF file."""
        ...

    @property
    def config(self) -> Any:
        """The model's transformers configuration."""
        ...

    @property
    def architecture(self) -> str:
        """The transformers class of the model."""
        ...

    @property
    def altered(self) -> str:
        """Digest of what was merged into the model or removed from it; empty if nothing was."""
        ...

    @property
    def tensors(self) -> WeightStore:
        """The stored parameters, by their names in the transformers model."""
        ...

    @property
    def tied(self) -> Mapping[str, str]:
        """Name of an absent parameter -> name of the stored one whose values it shares."""
        ...

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        ...

    def file_tensors(self) -> FileTensors:
        """Return the tensors under the names of the files."""
        ...

    def linear_parameters(self) -> tuple[str, ...]:
        """Return the names of the weights of all linear layers of the model."""
        ...
