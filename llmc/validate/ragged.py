"""Run a batch of prompts of unequal length through the artifact, padded on one side."""

from collections.abc import Iterator

import numpy as np

from llmc.arrays import Array
from llmc.runtime.session import Session
from llmc.validate.measure import require_comparable
from llmc.validate.positions import PromptBatch


def compare_ragged(
    model: Session, batch: PromptBatch, expected: Array, side: str
) -> Iterator[tuple[int, Array, Array]]:
    """Yield rows, positions (n,), and the largest absolute difference of a logit at each, of real tokens.

    Rows are padded on `side`; every decode step appends one token and one 1 of the attention mask to every
    row, so that the row's positions continue from its own length whatever the padding. If the graph returns
    one position per row, it is the position of the row's last token, whichever side is padded.

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
        compared = asked == prompt - 1 if last else asked < prompt
        actual = logits[i] if last else logits[i, mask[i] == 1][asked[compared]]
        yield i, asked[compared], row_differences(actual, expected[i, compared], place)
    for step in range(batch.steps):
        tokens = np.array([[batch.tokens[i, n + step]] for i, n in enumerate(batch.prompts)])
        logits = model.decode(tokens)
        for i, prompt in enumerate(batch.prompts):
            place = f"decode step {step + 1} of row {i} of {rows}, padded {side}"
            compared = asked == prompt + step
            yield i, asked[compared], row_differences(logits[i], expected[i, compared], place)


def row_differences(actual: Array, expected: Array, place: str) -> Array:
    """Return the largest absolute difference of each row, (rows,), of logits (rows, vocabulary).

    Raises:
        ParityError: Their shapes differ, or `actual` is not finite.
    """
    require_comparable(actual, expected.shape, place)
    differences: Array = np.abs(actual - expected).max(axis=-1, initial=0.0)
    return differences


def _pad_token(batch: PromptBatch) -> int:
    """Return a token that would have an effect if a pad were attended to; any real token does."""
    return int(batch.tokens[0, 0])
