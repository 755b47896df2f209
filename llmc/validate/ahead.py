"""Answer the steps of a session by one pass over each text that is known in advance.

A model that is streamed from disk reads all of its weights in every step, and states of fixed size do not go
back. The gates feed a model texts that are fixed before, and in a causal model the logits after a token do
not depend on how the tokens before it were cut into steps, nor on padding. So every text is run once, as the
original's are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.errors import ParityError
from llmc.graph.interface import Interface
from llmc.validate.positions import ReferencePass
from llmc.validate.reference import TorchModel

#: Most bytes of logits that are kept; the newest are kept whatever their size.
_KEPT_BYTES = 512 << 20


@dataclass(frozen=True)
class _Row:
    """A row of a known text.

    Args:
        text: Number of the text.
        row: Index of the row.
        tokens: Its tokens, (sequence,) int64.
    """

    text: int
    row: int
    tokens: Array


class AheadSession:
    """A session that can be fed the texts that it knows, and no others.

    Args:
        model: The transformers model.
        interface: The interface of the graph that was traced from the same model.
        where: What executes it, for reports.
        texts: The texts, and the positions whose logits will be read; those of others are zeros.
    """

    def __init__(self, model: Any, interface: Interface, where: str, texts: Sequence[ReferencePass]) -> None:
        self.interface = interface
        self.where = f"{where}; each text in one pass, from which steps are read"
        self._model = TorchModel(model)
        self._texts = tuple(texts)
        self._kept: dict[tuple[int, ...], Array] = {}
        self._rows: tuple[_Row, ...] = ()
        self._longest = 0
        self._lengths: Array = np.zeros(0, np.int64)

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        """Begin with a prompt of every row; arguments and result as for `Session`.

        Raises:
            ParityError: No known text begins with the prompts, or the model fails.
        """
        real = np.ones_like(input_ids) if mask is None else mask
        prompts = [row[kept == 1] for row, kept in zip(input_ids, real, strict=True)]
        self._longest = max(len(prompt) for prompt in prompts)
        self._rows = self._find(prompts)
        self._lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        logits = self._blank(*input_ids.shape)
        for row, (kept, prompt) in enumerate(zip(real, prompts, strict=True)):
            slots = np.flatnonzero(kept)
            for position, values in self._known(row, 0, len(prompt)):
                logits[row, slots[position]] = values
        return logits

    def decode(self, tokens: Array) -> Array:
        """Continue every row by its next tokens, (batch, sequence).

        Raises:
            ParityError: No known text continues so, or the model fails.
        """
        new, starts = tokens.shape[1], self._lengths.tolist()
        fed = [
            np.concatenate([row.tokens[:start], own])
            for row, start, own in zip(self._rows, starts, tokens, strict=True)
        ]
        pairs = zip(self._rows, fed, strict=True)
        same = all(_beginning(row.tokens[None], own) is not None for row, own in pairs)
        if not same or not _knows(self._texts[self._rows[0].text], fed):
            self._rows = self._find(fed)  # texts may begin alike
        logits = self._blank(*tokens.shape)
        for number, start in enumerate(starts):
            for position, values in self._known(number, start, start + new):
                logits[number, position - start] = values
        self._lengths = self._lengths + new
        return logits

    def next_tokens(self, tokens: Array) -> Array:
        """Continue every row by one token, (batch,), and return the most likely next ones, (batch,)."""
        chosen: Array = self.decode(tokens[:, None])[:, -1].argmax(axis=-1)
        return chosen

    def state(self) -> Array:
        """Return this point of the texts: the number of tokens of each row, (batch,) int64."""
        return self._lengths

    def restore(self, state: Array) -> None:
        """Go back to `state`, taken since the last prefill."""
        self._lengths = state

    def rewind(self, state: Array, total: int) -> None:
        """Go back to the first `total` tokens of `state`, taken since the last prefill of one row."""
        self._lengths = np.minimum(state, total)

    def _blank(self, rows: int, positions: int) -> Array:
        """Return zeros, of which only what is written takes memory."""
        return np.zeros((rows, positions, self.interface.vocabulary), np.float32)

    def _find(self, prompts: Sequence[Array]) -> tuple[_Row, ...]:
        """Return the known row that begins with each prompt, all from one text.

        Of several, one that knows the logits after the prompts is taken, and of these the one whose first
        step is the shortest that holds them: beyond a switch of rotary embeddings it decides what follows.
        """
        fitting = []
        for number, text in enumerate(self._texts):
            rows = np.atleast_2d(text.tokens)
            first = text.pieces[0] if text.pieces else rows.shape[1]
            found = [_beginning(rows, prompt) for prompt in prompts]
            if first >= self._longest and all(row is not None for row in found):
                known = (_Row(number, row, rows[row]) for row in found if row is not None)
                fitting.append((not _knows(text, prompts), first, number, tuple(known)))
        if not fitting:
            raise ParityError("the tokens begin no text that is known in advance")
        return min(fitting, key=lambda each: each[:3])[3]

    def _known(self, row: int, start: int, stop: int) -> Iterator[tuple[int, Array]]:
        """Yield the positions in a range of a row whose logits are known, with them, (vocabulary,)."""
        text = self._texts[self._rows[row].text]
        logits = self._logits()[row]
        for index in np.flatnonzero((text.positions >= start) & (text.positions < stop)):
            yield int(text.positions[index]), logits[index]

    def _logits(self) -> Array:
        """Return the logits of the current rows, (rows, positions, vocabulary)."""
        text = self._texts[self._rows[0].text]
        key = (self._rows[0].text, *(row.row for row in self._rows))
        if key not in self._kept:
            while self._kept and sum(array.nbytes for array in self._kept.values()) > _KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
            tokens = np.stack([row.tokens for row in self._rows])
            self._kept[key] = self._model.logits_at(tokens, text.positions, pieces=text.pieces)
        return self._kept[key]


def _knows(text: ReferencePass, prompts: Sequence[Array]) -> bool:
    """Return whether the logits after each prompt will be known."""
    return bool(np.isin([len(prompt) - 1 for prompt in prompts], text.positions).all())


def _beginning(rows: Array, prompt: Array) -> int | None:
    """Return the first of `rows` that begins with a prompt."""
    same = (rows[:, : len(prompt)] == prompt).all(axis=1) if rows.shape[1] >= len(prompt) else np.zeros(0)
    return int(same.argmax()) if same.any() else None
