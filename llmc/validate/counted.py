"""Report the progress of a measurement while its session runs."""

from typing import Any

from llmc.arrays import Array
from llmc.runtime.session import Session
from llmc.validate.reference import Advance


class Counted:
    """Forward everything to a session, and count its runs.

    Args:
        model: The session.
        total: Number of runs that there will be.
        advance: Called with the number of runs done and `total`.
    """

    def __init__(self, model: Session, total: int, advance: Advance) -> None:
        self._model, self._total, self._advance, self._done = model, total, advance, 0
        self.interface, self.where = model.interface, model.where

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        """Do what `Session.prefill` does."""
        return self._count(self._model.prefill(input_ids, mask, steps=steps))

    def decode(self, tokens: Array) -> Array:
        """Do what `Session.decode` does."""
        return self._count(self._model.decode(tokens))

    def state(self) -> Any:
        """Do what `Session.state` does."""
        return self._model.state()

    def rewind(self, state: Any, total: int) -> None:
        """Do what `Session.rewind` does."""
        self._model.rewind(state, total)

    def _count(self, logits: Array) -> Array:
        self._done += 1
        self._advance(self._done, self._total)
        return logits
