"""Step through a KV cache of fixed length: the part that every runtime of such a graph shares.

A row's slots are filled from 0 on; padding is on the right and is overwritten by the next tokens. No token
sees slots after a row's end, so only the lengths are needed to go back to an earlier point.
"""

from abc import ABC, abstractmethod

import numpy as np

from llmc.arrays import Array
from llmc.errors import ConfigError
from llmc.graph.interface import Interface


class StaticSession(ABC):
    """A model with the static KV cache of one batch; a runtime provides `_clear` and `_run`.

    Args:
        interface: Inputs and outputs of the graph.
        where: Runtime and device, for reports of measurements.
        most: Largest number of new tokens per row in one run; longer inputs are split. None for any number.

    Raises:
        ConfigError: The cache has no fixed length.
    """

    def __init__(self, interface: Interface, where: str, *, most: int | None = None) -> None:
        if not interface.static_cache or interface.max_length is None:
            raise ConfigError("the graph's KV cache has no fixed length")
        self.interface = interface
        self.where = where
        self.capacity = interface.max_length
        self._most = self.capacity if most is None else most
        self._written = np.zeros(0, np.int64)

    @abstractmethod
    def _clear(self, batch: int) -> None:
        """Give the cache `batch` rows and zero it: a masked slot must not hold NaN."""

    @abstractmethod
    def _run(self, input_ids: Array, written: Array, real: Array) -> Array:
        """Run the graph once.

        Args:
            input_ids: (batch, sequence) int64, at most `most` tokens per row.
            written: (batch,) int64, the slot of each row's first token.
            real: (batch,) int64, number of tokens of each row before its padding, at least 1.

        Returns:
            Logits, (batch, sequence or 1, vocabulary) float32.
        """

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        """Run a prompt from an empty cache.

        Args:
            input_ids: (batch, sequence) int64.
            mask: (batch, sequence) int64, 1 where a token is real, padding on the right; None if all are
                real.
            steps: Decode steps that will follow.

        Returns:
            Logits, (batch, sequence or 1, vocabulary) float32.

        Raises:
            ConfigError: Prompt and steps exceed the cache.
            ParityError: The run failed, or the shape of an output differs from the interface.
        """
        batch, sequence = input_ids.shape
        self._require_slots(sequence + steps)
        self._clear(batch)
        self._written = np.zeros(batch, np.int64)
        lengths = np.full(batch, sequence, np.int64) if mask is None else mask.sum(axis=1)
        return self._advance(input_ids, lengths)

    def decode(self, tokens: Array) -> Array:
        """Run one or several further tokens of every row.

        Args:
            tokens: (batch, sequence) int64.

        Returns:
            Logits, (batch, sequence or 1, vocabulary) float32.

        Raises:
            ConfigError: The cache is full.
            ParityError: As for `prefill`.
        """
        batch, sequence = tokens.shape
        self._require_slots(int(self._written.max()) + sequence)
        return self._advance(tokens, np.full(batch, sequence, np.int64))

    def next_tokens(self, tokens: Array) -> Array:
        """Run one more token of every row, (batch,), and return the most likely next ones, (batch,).

        Raises:
            ConfigError: The cache is full.
            ParityError: As for `prefill`.
        """
        chosen: Array = self.decode(tokens[:, None])[:, -1].argmax(axis=-1)
        return chosen

    def state(self) -> Array:
        """Return this point of the sequence, to `restore` later: number of tokens per row, (batch,) int64."""
        return self._written

    def restore(self, state: Array) -> None:
        """Go back to `state`, taken since the last prefill."""
        self._written = state

    def rewind(self, state: Array, total: int) -> None:
        """Go back to the first `total` tokens of `state`, taken since the last prefill of one row."""
        self._written = np.minimum(state, total)

    def _advance(self, tokens: Array, lengths: Array) -> Array:
        """Run `tokens` in pieces; rows that end before a piece do not advance."""
        parts: list[Array] = []
        for start in range(0, tokens.shape[1], self._most):
            piece = tokens[:, start : start + self._most]
            real = np.clip(lengths - start, 0, piece.shape[1])
            logits = self._run(piece, self._written, np.maximum(real, 1))
            self._written = self._written + real
            if parts and self.interface.logits == "last":
                parts = [np.where(real[:, None, None] > 0, logits, parts[0])]
            else:
                parts.append(logits)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _require_slots(self, needed: int) -> None:
        if needed > self.capacity:
            raise ConfigError(
                f"the KV cache has {self.capacity} slots, but {needed} are needed",
                hint="build with a larger kv_capacity",
            )
