"""Describe the tensors of a checkpoint under the names of its files."""

from collections.abc import Mapping
from dataclasses import dataclass

from llmc.graph.weights import WeightStore


@dataclass(frozen=True)
class FilePart:
    """The place of a tensor of the files in the model.

    Args:
        parameter: The parameter of the model that it is, or is a part of.
        expert: Index of its expert in a parameter (experts, outputs, inputs); None if it is all of one.
        rows: The outputs of that expert that it holds, from one to before another.
        joined: Whether the model has it only joined or rearranged with other tensors.
    """

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    joined: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is the parameter."""
        return self.expert is None and not self.joined


@dataclass(frozen=True)
class FileTensors:
    """The tensors of a checkpoint under the names of its files.

    Args:
        store: Their values; those that the files store quantized are floats.
        parts: What the model makes of each tensor that it uses.
        are_files: Whether the files hold these tensors; if not, they were computed, such as those of a GGUF
            file, of a pruned model, or of one with an adapter.
    """

    store: WeightStore
    parts: Mapping[str, FilePart]
    are_files: bool = True
