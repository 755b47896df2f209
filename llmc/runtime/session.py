"""What measurements ask of a model, whatever executes it."""

from typing import Any, Protocol

from llmc.arrays import Array
from llmc.graph.interface import Interface


class Session(Protocol):
    """What the measurements ask of a model: prefill and decode over the KV cache of one batch."""

    interface: Interface
    where: str

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        """Logits of a prompt, run from an empty cache."""
        ...

    def decode(self, tokens: Array) -> Array:
        """Logits of one more token of every row."""
        ...

    def state(self) -> Any:
        """This point of the sequence."""
        ...

    def rewind(self, state: Any, total: int) -> None:
        """Go back to the first `total` tokens of `state`, taken since the last prefill of one row."""
        ...


class Rewindable(Session, Protocol):
    """A session that goes back to an earlier point, so that steps from there can be timed again."""

    def restore(self, state: Any) -> None:
        """Go back to a point since the last prefill."""
        ...
