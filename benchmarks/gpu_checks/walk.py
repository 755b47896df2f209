"""Run the same tokens through any session, in every kind of step, and compare the logits.

The levels are as in `llmc verify`: a prompt, a piece over the cache of that prompt, single steps after it,
and a batch of prompts of unequal length with steps after it. Each run keeps the last real token's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_checks.room import bound, drawn_tokens
from llmc.artifact.manifest import Manifest
from llmc.config import Metric
from llmc.runtime.session import Session

PROMPT, PIECE, STEPS = 40, 13, 24
#: Lengths of the rows of a batch, and the steps after it; lengths where rows must be equally long.
ROWS, ROW_STEPS, EQUAL_ROWS = (20, 11, 3), 4, (20, 20, 20)
#: The target's bound for each level.
BOUNDS: Mapping[str, Metric] = {
    "prefill": Metric.PREFILL_MAX_ABS,
    "piece": Metric.CHUNKS_MAX_ABS,
    "decode": Metric.DECODE_MAX_ABS,
    "ragged": Metric.RAGGED_MAX_ABS,
}


@dataclass(frozen=True)
class Tokens:
    """The tokens of a walk.

    Args:
        sequence: Tokens of the one long row.
        rows: Tokens of each row of the batch, its steps included.
        lengths: Number of tokens of each row before the steps.
        side: The side on which shorter rows are padded.
    """

    sequence: np.ndarray
    rows: np.ndarray
    lengths: tuple[int, ...]
    side: str


def walk_tokens(manifest: Manifest) -> Tokens:
    """Draw the tokens of a walk for an artifact."""
    padding = manifest.interface.padding
    lengths = EQUAL_ROWS if padding == "none" else ROWS
    drawn = drawn_tokens(manifest, len(lengths) + 1, max(PROMPT + PIECE + STEPS, max(lengths) + ROW_STEPS))
    return Tokens(drawn[0], drawn[1:], lengths, "left" if padding == "left" else "right")


def walk(session: Session, tokens: Tokens) -> dict[str, np.ndarray]:
    """Run the tokens through a session; return the logits of each level, (runs and rows, vocabulary)."""
    ids, ends = tokens.sequence[None], (PROMPT, PROMPT + PIECE, PROMPT + PIECE + STEPS)
    prefill = session.prefill(ids[:, : ends[0]], steps=ends[2] - ends[0])[:, -1]
    piece = session.decode(ids[:, ends[0] : ends[1]])[:, -1]
    decode = [session.decode(ids[:, at : at + 1])[:, -1] for at in range(ends[1], ends[2])]
    return {
        "prefill": prefill,
        "piece": piece,
        "decode": np.concatenate(decode),
        "ragged": _walk_rows(session, tokens),
    }


def _walk_rows(session: Session, tokens: Tokens) -> np.ndarray:
    longest = max(tokens.lengths)
    ids = np.full((len(tokens.lengths), longest), tokens.rows[0, 0], np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(tokens.lengths):
        slots = slice(0, length) if tokens.side == "right" else slice(longest - length, longest)
        ids[row, slots], mask[row, slots] = tokens.rows[row, :length], 1
    logits = session.prefill(ids, mask, steps=ROW_STEPS)
    if session.interface.logits == "all":
        ends = [length - 1 if tokens.side == "right" else longest - 1 for length in tokens.lengths]
        last = logits[np.arange(len(ends)), ends]
    else:
        last = logits[:, -1]
    steps = [last]
    for step in range(ROW_STEPS):
        next_ones = [tokens.rows[row, length + step] for row, length in enumerate(tokens.lengths)]
        steps.append(session.decode(np.array(next_ones, np.int64)[:, None])[:, -1])
    return np.concatenate(steps)


def walk_original(ask: Callable[[np.ndarray, int], np.ndarray], tokens: Tokens) -> dict[str, np.ndarray]:
    """Return what `walk` must return, from whole sequences.

    Args:
        ask: Returns the logits of the last positions of a sequence, (positions, vocabulary), given the tokens
            (n,) and the number of positions.
    """
    ends = (PROMPT, PROMPT + PIECE, PROMPT + PIECE + STEPS)
    whole = ask(tokens.sequence[: ends[2]], STEPS + PIECE + 1)
    rows = [
        ask(tokens.rows[row, : length + ROW_STEPS], ROW_STEPS + 1)
        for row, length in enumerate(tokens.lengths)
    ]
    return {
        "prefill": whole[:1],
        "piece": whole[PIECE : PIECE + 1],
        "decode": whole[PIECE + 1 :],
        "ragged": np.concatenate(np.stack(rows, axis=1)),
    }


def bounds_of(manifest: Manifest) -> dict[str, float | None]:
    """Return the target's own bound for each level."""
    return {level: bound(manifest, metric) for level, metric in BOUNDS.items()}


def compare(
    bounds: Mapping[str, float | None],
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], str | None]:
    """Return the largest difference of a logit at each level, and what is beyond the bounds.

    Args:
        bounds: The bound of each level; None for a level without one.
        actual: The logits of each level.
        expected: What they are compared with.
    """
    figures: dict[str, Any] = {}
    beyond = []
    for level, most in bounds.items():
        difference = float(np.abs(actual[level] - expected[level]).max())
        figures[f"{level}_max_abs"] = difference
        if not np.isfinite(difference) or (most is not None and difference > most):
            beyond.append(f"{level} differs by {difference:.3g} logits, the bound is {most}")
    agree = [(actual[level].argmax(-1) == expected[level].argmax(-1)).mean() for level in bounds]
    figures["top1_agreement"] = float(np.mean(agree))
    figures["logits_deviation"] = float(np.std(expected["decode"]))
    return figures, "; ".join(beyond) or None
