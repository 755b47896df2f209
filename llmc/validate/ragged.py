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
            (prompt + steps, vocabulary), or (steps + 2, vocabulary) for a graph that returns only
            the last position.
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
    graph returns only the last position and pads stand on the right, the last slot of a shorter row
    is a pad: such rows are prefilled up to their last token, which is then decoded.

    Args:
        side: "left" or "right".

    Raises:
        ParityError: A shape is not the original's, or a logit at a real token is not finite.
    """
    last = model.interface.logits == "last"
    held_back = 1 if last and side == "right" else 0
    heads = [row.prompt - held_back for row in rows]
    sequence = max(heads)
    ids = np.full((len(rows), sequence), _pad_token(rows), np.int64)
    mask = np.zeros_like(ids)
    for i, (row, head) in enumerate(zip(rows, heads, strict=True)):
        slots = slice(0, head) if side == "right" else slice(sequence - head, sequence)
        ids[i, slots] = row.tokens[:head]
        mask[i, slots] = 1

    logits = model.prefill(ids, mask, steps=steps + held_back)
    worst = 0.0
    for i, (row, head) in enumerate(zip(rows, heads, strict=True)):
        place = f"prefill of row {i} of {len(rows)}, padded {side}"
        if not last:
            worst = max(worst, max_abs(logits[i, mask[i] == 1], row.expected[:head], place))
        elif mask[i, -1]:
            worst = max(worst, max_abs(logits[i, -1], row.at(head - 1), place))
    for step in range(steps + held_back):
        tokens = np.array([[row.tokens[head + step]] for row, head in zip(rows, heads, strict=True)])
        logits = model.decode(tokens)
        for i, (row, head) in enumerate(zip(rows, heads, strict=True)):
            place = f"decode step {step + 1} of row {i} of {len(rows)}, padded {side}"
            worst = max(worst, max_abs(logits[i, -1], row.at(head + step), place))
    return worst


def _pad_token(rows: Sequence[Row]) -> int:
    """A token that would be seen if a pad were attended to: any real one will do."""
    return int(rows[0].tokens[0])
