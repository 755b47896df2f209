"""Compare the original's steps over its cache with its own pass over the same tokens.

transformers may have two programs for one model, such as a kernel for many tokens and another for a single
step. Their results can differ by more than rounding, or one of them can be wrong. Every reference of the gate
is one pass; only beyond a switch of rotary embeddings, where steps are another function by design, is it
several. So this distance decides no verdict. It tells the user why text that the original generates step by
step may differ from the artifact's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.errors import ParityError, UnsupportedError
from llmc.validate.measure import measured, unmeasured
from llmc.validate.reference import Reference

#: Number of texts that are run as one batch, the tokens of each before the first step, and the steps. A model
#: that is streamed from disk reads all of its weights in every step, and gets fewer.
ROWS, PREFIX, STEPS, STREAMED_STEPS = 8, 24, 8, 2
_WHERE = "PyTorch, float32"
#: Logits. Up to this distance the description calls both programs one function; it decides nothing else.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class OwnDistance:
    """The distance of the original's steps from its own pass.

    Args:
        logits: (rows, positions), largest difference of a logit; NaN where the steps give NaN or infinity.
        other: (rows, positions), 1 where the most likely token is another one, 0 elsewhere.
    """

    logits: Array
    other: Array


class SelfComparing(Protocol):
    """The original that can be compared with itself."""

    def own_distance(self, input_ids: Array, pieces: Sequence[int]) -> OwnDistance:
        """Do what `compare_steps` does."""
        ...


def compare_steps(model: Reference, input_ids: Array, pieces: Sequence[int]) -> OwnDistance:
    """Compare the logits after the last token of each of `pieces` but the first with those of one pass.

    Args:
        input_ids: (rows, sequence) int64.
        pieces: Tokens of each step over one cache.

    Raises:
        ParityError: The pass gives NaN or infinity.
        UnsupportedError: The original fails.
    """
    positions = np.cumsum(pieces)[1:] - 1
    expected = model.logits_at(input_ids, positions)
    try:
        actual = model.logits_at(input_ids, positions, pieces=pieces)
    except ParityError:
        return OwnDistance(np.full(expected.shape[:2], np.nan), np.ones(expected.shape[:2]))
    return OwnDistance(
        np.abs(actual - expected).max(axis=-1).astype(np.float64),
        (actual.argmax(axis=-1) != expected.argmax(axis=-1)).astype(np.float64),
    )


def measure_itself(
    original: SelfComparing, limit: int | None, text: Array, switches: Sequence[int], steps: int
) -> Measurement:
    """Measure the largest difference of a logit between the original's steps and its own pass.

    Nothing bounds it, and no tolerance is derived from it. Figures that are not finite are not a fault of the
    artifact, and neither are errors of the original's steps: the metric is then not measured.

    Args:
        limit: Positions of the model; None for any number.
        text: (n,) int64, the evaluation text.
        switches: Lengths beyond which the original computes differently; no step lies beyond the first. Where
            there are any, references are computed in pieces, so that a piece is compared, too.
        steps: Number of single steps.
    """
    total = min(PREFIX + steps, limit or 1 << 62, *switches)
    steps = min(steps, total // 2)
    prefix = total - steps
    first = [prefix - prefix // 2, prefix // 2] if switches else [prefix]
    pieces = (*(n for n in first if n), *[1] * steps)
    if len(pieces) < 2:
        why = f"the model ends at {total} positions"
        return unmeasured(Metric.ORIGINAL_DECODE, MeasurementStatus.NOT_APPLICABLE, why, _WHERE)
    starts = np.arange(ROWS) * max(1, len(text) // ROWS)
    tokens = np.take(text, starts[:, None] + np.arange(total), mode="wrap")
    held = "the artifact is therefore compared with its one pass"
    try:
        distance = original.own_distance(tokens, pieces)
    except UnsupportedError as error:
        why = f"{error.fact}; {held}"
        return unmeasured(Metric.ORIGINAL_DECODE, MeasurementStatus.NOT_MEASURED, why, _WHERE)
    value, positions = float(distance.logits.max()), f"{distance.logits.size} positions"
    if not np.isfinite(value):
        why = f"the original decodes to NaN or infinity within {positions}, unlike its own one pass; {held}"
        return unmeasured(Metric.ORIGINAL_DECODE, MeasurementStatus.NOT_MEASURED, why, _WHERE)
    ends = np.cumsum(pieces)[1:].tolist()
    figures = dict(
        zip((f"after_{n}_tokens" for n in ends), distance.logits.max(axis=0).tolist(), strict=True)
    )
    others = int(distance.other.sum())
    detail = f"the original decodes as in its own one pass, within {value:.2g} logits over {positions}"
    if value > _ROUNDING:
        choice = f" and prefers another token at {others} of them" if others else ""
        off = f"the original decodes {value:.2g} logits off its own one pass"
        detail = f"{off} over {positions}{choice}; {held}"
    return measured(
        Metric.ORIGINAL_DECODE, value, detail, _WHERE, {**figures, "other_choices": float(others)}
    )


def differs(measurement: Measurement) -> bool:
    """Return whether the original's steps and its pass are two functions, or its steps fail."""
    return measurement.status is MeasurementStatus.NOT_MEASURED or (measurement.value or 0.0) > _ROUNDING
