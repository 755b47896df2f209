"""Describe the tensors that a build writes into a checkpoint artifact, to compute and compare them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from llmc.arrays import Array
from llmc.graph.weights import WeightStore


@dataclass(frozen=True)
class WrittenTensors:
    """Tensors of a checkpoint artifact that one computation gives, such as the parts of a quantized matrix.

    Args:
        specs: Element type and shape of each tensor, by its name in the files.
        compute: Returns every tensor of `specs` by its name.
        weight: Name of the graph's matrix before quantization, whose codes a build may take from calibration;
            None for tensors that the checkpoint alone determines.
    """

    specs: Mapping[str, tuple[ir.DataType, tuple[int, ...]]]
    compute: Callable[[], Mapping[str, Array]]
    weight: str | None = None


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
