"""A session that tells how much of a measurement is done."""

from typing import Any

from llmc.arrays import Array
from llmc.runtime.session import Session
from llmc.validate.reference import Advance


class Counted:
    """Passes everything on to a session, and counts its runs.

    Args:
        model: The session.
        total: Runs that there will be.
        advance: Told how many of them are done.
    """

    def __init__(self, model: Session, total: int, advance: Advance) -> None:
        self._model, self._total, self._advance, self._done = model, total, advance, 0
        self.interface, self.where = model.interface, model.where

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        """As `Session.prefill`."""
        return self._count(self._model.prefill(input_ids, mask, steps=steps))

    def decode(self, tokens: Array) -> Array:
        """As `Session.decode`."""
        return self._count(self._model.decode(tokens))

    def state(self) -> Any:
        """As `Session.state`."""
        return self._model.state()

    def rewind(self, state: Any, total: int) -> None:
        """As `Session.rewind`."""
        self._model.rewind(state, total)

    def _count(self, logits: Array) -> Array:
        self._done += 1
        self._advance(self._done, self._total)
        return logits
