"""A batch of prompts of unequal length through the artifact, padded on one side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.validate.measure import max_abs
from llmc.validate.session import Session

Array = np.ndarray


@dataclass(frozen=True)
class Row:
    """One row of the batch.

    Args:
        tokens: Prompt and the tokens decoded after it, (prompt + steps,) int64.
        expected: The original's logits for the last positions of `tokens` alone, float32:
            (prompt + steps, vocabulary), or (steps + 1, vocabulary) for a graph that returns one
            position a row.
        prompt: Length of the prompt.
    """

    tokens: Array
    expected: Array
    prompt: int

    def at(self, position: int) -> Array:
        """Expected logits (vocabulary,) at `position` of the row."""
        logits: Array = self.expected[position - len(self.tokens)]
        return logits


def compare_ragged(model: Session, rows: Sequence[Row], steps: int, side: str) -> float:
    """Largest absolute logit difference over the real tokens of all rows.

    Rows are padded on `side`; every decode step appends one token and one 1 of the attention mask to
    every row, so that the row's positions go on from its own length whatever the padding. Where the
    graph returns one position a row, it is that of the row's last token, on either side of the pads.

    Args:
        side: "left" or "right".

    Raises:
        ParityError: A shape is not the original's, or a logit at a real token is not finite.
    """
    last = model.interface.logits == "last"
    sequence = max(row.prompt for row in rows)
    ids = np.full((len(rows), sequence), _pad_token(rows), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        slots = slice(0, row.prompt) if side == "right" else slice(sequence - row.prompt, sequence)
        ids[i, slots] = row.tokens[: row.prompt]
        mask[i, slots] = 1

    logits = model.prefill(ids, mask, steps=steps)
    worst = 0.0
    for i, row in enumerate(rows):
        place = f"prefill of row {i} of {len(rows)}, padded {side}"
        if last:
            worst = max(worst, max_abs(logits[i, -1], row.at(row.prompt - 1), place))
        else:
            worst = max(worst, max_abs(logits[i, mask[i] == 1], row.expected[: row.prompt], place))
    for step in range(steps):
        tokens = np.array([[row.tokens[row.prompt + step]] for row in rows])
        logits = model.decode(tokens)
        for i, row in enumerate(rows):
            place = f"decode step {step + 1} of row {i} of {len(rows)}, padded {side}"
            worst = max(worst, max_abs(logits[i, -1], row.at(row.prompt + step), place))
    return worst


def _pad_token(rows: Sequence[Row]) -> int:
    """A token that would be seen if a pad were attended to: any real one will do."""
    return int(rows[0].tokens[0])
