"""The tensors of one quantized module of a checkpoint, by the last part of their name."""

from collections.abc import Callable

import numpy as np

from llmc.arrays import Array
from llmc.checkpoint.ranges import WholeValues
from llmc.errors import CheckpointError
from llmc.graph.weights import WeightStore

#: Rows start:stop of a part.
Part = Callable[[int, int], Array]


class Source:
    """The files' tensors of one module.

    Args:
        kept: What is kept of a tensor from one range of its rows to the next, by part; shared by all modules,
            so that each thread holds one tensor of a part at most.
        joint: What stands between the name of the module and that of a part.
    """

    def __init__(self, raw: WeightStore, module: str, kept: dict[str, WholeValues], joint: str = ".") -> None:
        self._raw, self.module, self._kept, self._joint = raw, module, kept, joint

    def has(self, part: str) -> bool:
        return self._name(part) in self._raw.infos()

    def shape(self, part: str) -> tuple[int, ...]:
        """Raises CheckpointError: The files lack it."""
        if not self.has(part):
            raise CheckpointError(
                f"the files lack {self._name(part)}, which a quantized module needs",
                hint="download the files again; if they never had it, compile the original in float instead",
            )
        return self._raw.infos()[self._name(part)].shape

    def matrix(self, part: str) -> tuple[int, int]:
        """Raises CheckpointError: The files lack it, or it has not two axes."""
        shape = self.shape(part)
        if len(shape) != 2:
            raise CheckpointError(f"{self._name(part)} has shape {list(shape)}, and a matrix is expected")
        return shape[0], shape[1]

    def dtype(self, part: str) -> np.dtype:
        return self._raw.infos()[self._name(part)].dtype.numpy()

    def read(self, part: str, start: int = 0, stop: int | None = None) -> Array:
        return self._raw.read(self._name(part), start, stop)

    def rows(self, part: str, arrange: Callable[[Array], Array], start: int, stop: int) -> Array:
        """Rows of `arrange(whole tensor)`, which is kept while a walk over its rows goes on."""
        kept = self._kept.setdefault(part, WholeValues())
        return kept.rows(self.module, lambda: arrange(self.read(part)), start, stop)

    def require(self, part: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError: The tensor is missing or has another shape."""
        if self.shape(part) != shape:
            raise CheckpointError(
                f"{self._name(part)} has shape {list(self.shape(part))}, and {list(shape)} by the other "
                "tensors of its module and quantization_config"
            )

    def _name(self, part: str) -> str:
        return f"{self.module}{self._joint}{part}"
