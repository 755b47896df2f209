"""A batch of prompts of unequal length through the artifact, padded on one side."""

from collections.abc import Iterator

import numpy as np

from llmc.arrays import Array
from llmc.runtime.session import Session
from llmc.validate.measure import require_comparable
from llmc.validate.positions import Batch


def compare_ragged(
    model: Session, batch: Batch, expected: Array, side: str
) -> Iterator[tuple[int, Array, Array]]:
    """Rows, positions (n,), and the largest absolute difference of a logit at each, (n,), of real tokens.

    Rows are padded on `side`; every decode step appends one token and one 1 of the attention mask to
    every row, so that the row's positions go on from its own length whatever the padding. Where the
    graph returns one position a row, it is that of the row's last token, on either side of the pads.

    Args:
        expected: The original's logits of each row alone at the positions of `batch.reference_pass`, float32:
            (rows, positions, vocabulary).
        side: "left" or "right".

    Raises:
        ParityError: A shape is not the original's, or a logit at a real token is not finite.
    """
    last = model.interface.logits == "last"
    asked = batch.reference_pass.positions
    rows, sequence = len(batch.prompts), max(batch.prompts)
    ids = np.full((rows, sequence), _pad_token(batch), np.int64)
    mask = np.zeros_like(ids)
    for i, prompt in enumerate(batch.prompts):
        slots = slice(0, prompt) if side == "right" else slice(sequence - prompt, sequence)
        ids[i, slots] = batch.tokens[i, :prompt]
        mask[i, slots] = 1

    logits = model.prefill(ids, mask, steps=batch.steps)
    for i, prompt in enumerate(batch.prompts):
        place = f"prefill of row {i} of {rows}, padded {side}"
        wanted = asked == prompt - 1 if last else asked < prompt
        made = logits[i] if last else logits[i, mask[i] == 1][asked[wanted]]
        yield i, asked[wanted], row_differences(made, expected[i, wanted], place)
    for step in range(batch.steps):
        tokens = np.array([[batch.tokens[i, n + step]] for i, n in enumerate(batch.prompts)])
        logits = model.decode(tokens)
        for i, prompt in enumerate(batch.prompts):
            place = f"decode step {step + 1} of row {i} of {rows}, padded {side}"
            wanted = asked == prompt + step
            yield i, asked[wanted], row_differences(logits[i], expected[i, wanted], place)


def row_differences(actual: Array, expected: Array, place: str) -> Array:
    """Largest absolute difference of each row, (rows,), of logits (rows, vocabulary).

    Raises:
        ParityError: Their shapes differ, or `actual` is not finite.
    """
    require_comparable(actual, expected.shape, place)
    found: Array = np.abs(actual - expected).max(axis=-1, initial=0.0)
    return found


def _pad_token(batch: Batch) -> int:
    """A token that would be seen if a pad were attended to: any real one will do."""
    return int(batch.tokens[0, 0])
