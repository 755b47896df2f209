"""Read the tensors of one quantized module of a checkpoint by the last part of their name."""

from collections.abc import Callable

import numpy as np

from llmc.arrays import Array
from llmc.checkpoint.ranges import WholeValues
from llmc.errors import CheckpointError
from llmc.graph.weights import WeightStore

#: Reader of rows start:stop of a part.
Part = Callable[[int, int], Array]


class Source:
    """The tensors of one module in the files.

    Args:
        whole: Whole tensors kept from one range of rows to the next, by part; all modules share it, so that
            each thread holds at most one tensor per part.
        joint: Separator between the name of the module and the name of a part.
    """

    def __init__(
        self, raw: WeightStore, module: str, whole: dict[str, WholeValues], joint: str = "."
    ) -> None:
        self._raw, self.module, self._whole, self._joint = raw, module, whole, joint

    def has(self, part: str) -> bool:
        return self._name(part) in self._raw.infos()

    def shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a part.

        Raises:
            CheckpointError: The part is missing from the files.
        """
        if not self.has(part):
            raise CheckpointError(
                f"the files lack {self._name(part)}, which a quantized module needs",
                hint="download the files again; if they never had it, compile the original in float instead",
            )
        return self._raw.infos()[self._name(part)].shape

    def matrix(self, part: str) -> tuple[int, int]:
        """Return the shape of a part with two axes.

        Raises:
            CheckpointError: The part is missing from the files, or does not have two axes.
        """
        shape = self.shape(part)
        if len(shape) != 2:
            raise CheckpointError(f"{self._name(part)} has shape {list(shape)}, but a matrix is expected")
        return shape[0], shape[1]

    def dtype(self, part: str) -> np.dtype:
        return self._raw.infos()[self._name(part)].dtype.numpy()

    def read(self, part: str, start: int = 0, stop: int | None = None) -> Array:
        return self._raw.read(self._name(part), start, stop)

    def rows(self, part: str, arrange: Callable[[Array], Array], start: int, stop: int) -> Array:
        """Return rows of `arrange(whole tensor)`, which is kept until its last row has been read."""
        values = self._whole.setdefault(part, WholeValues())
        return values.rows(self.module, lambda: arrange(self.read(part)), start, stop)

    def require(self, part: str, shape: tuple[int, ...]) -> None:
        """Check the shape of a part.

        Raises:
            CheckpointError: The part is missing or has another shape.
        """
        if self.shape(part) != shape:
            raise CheckpointError(
                f"{self._name(part)} has shape {list(self.shape(part))}, but the other tensors of its module "
                f"and quantization_config imply {list(shape)}"
            )

    def _name(self, part: str) -> str:
        return f"{self.module}{self._joint}{part}"
