"""Define what measurements need from a model, whichever runtime executes it."""

from typing import Any, Protocol

from llmc.arrays import Array
from llmc.graph.interface import Interface


class Session(Protocol):
    """The operations that measurements need: prefill and decode over the KV cache of one batch."""

    interface: Interface
    where: str

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        """Run a prompt from an empty cache and return its logits."""
        ...

    def decode(self, tokens: Array) -> Array:
        """Run one more token of every row and return its logits."""
        ...

    def state(self) -> Any:
        """Return this point of the sequence."""
        ...

    def rewind(self, state: Any, total: int) -> None:
        """Go back to the first `total` tokens of `state`, taken since the last prefill of one row."""
        ...


class Rewindable(Session, Protocol):
    """A session that can go back to an earlier point, so that steps from there can be timed again."""

    def next_tokens(self, tokens: Array) -> Array:
        """Run one more token of every row, (batch,), and return the most likely next ones, (batch,)."""
        ...

    def restore(self, state: Any) -> None:
        """Go back to a point since the last prefill."""
        ...
