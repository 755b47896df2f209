"""A session that stands in for an artifact that is not open yet."""

import numpy as np

from llmc.graph.interface import Interface

Array = np.ndarray


class BlankSession:
    """A `Session` whose every logit is zero, in arrays that take no memory.

    A measurement against it asks the original everything that it will ask later, so that the original can be
    released before the artifact is opened.

    Args:
        interface: What the artifact is said to take and give.
    """

    def __init__(self, interface: Interface) -> None:
        self.interface = interface
        self.where = "nowhere"
        self._vocabulary = interface.vocabulary

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        """(batch, sequence or 1, vocabulary) float32."""
        return self.decode(input_ids)

    def decode(self, tokens: Array) -> Array:
        """(batch, sequence or 1, vocabulary) float32."""
        batch, sequence = tokens.shape
        positions = 1 if self.interface.logits == "last" else sequence
        return np.broadcast_to(np.float32(0), (batch, positions, self._vocabulary))
