"""How far rounding in float32 moves the original itself: the floor of what can be asked of an artifact.

Two right programs of one model differ by rounding, by 1e-5 to 1e-4 logits for trained models. Where logits
are large or a model passes small differences on, the original differs from itself by more between one pass
over a text and the same text token by token, and no artifact can be nearer to it than that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.artifact.verdict import Measurement
from llmc.config import Gate, Metric
from llmc.validate.reference import TorchModel

Array = np.ndarray

#: Levels whose bound is on the largest difference of a logit.
LEVELS = (
    Metric.PREFILL_MAX_ABS,
    Metric.CHUNKS_MAX_ABS,
    Metric.DECODE_MAX_ABS,
    Metric.RAGGED_MAX_ABS,
    Metric.WINDOW_MAX_ABS,
)
#: Tokens of the text that are compared, of which the last STEPS come one by one.
TOKENS, STEPS = 96, 48
#: How many times the original's own difference is let through: a sample of 48 steps knows it roughly.
_TIMES = 4.0
#: Share of the largest logit beyond which nothing is put down to rounding.
_MOST = 1e-3


@dataclass(frozen=True)
class Conditioning:
    """The original against itself.

    Args:
        difference: Largest difference of a logit between one pass and single steps.
        largest: Largest magnitude of a logit.
    """

    difference: float
    largest: float

    @property
    def tolerance(self) -> float:
        """Largest difference of a logit that is put down to rounding."""
        return min(_TIMES * self.difference, _MOST * self.largest)


def measure_conditioning(model: TorchModel, tokens: Array) -> Conditioning:
    """Compare the original's one pass over the beginning of `tokens` (n,) with the same in single steps."""
    sequence = tokens[: min(TOKENS, len(tokens))]
    keep = min(STEPS, len(sequence) - 1)
    whole = model.logits(sequence, keep=keep)
    stepped = model.stepped_logits(sequence, keep=keep)
    return Conditioning(float(np.abs(whole - stepped).max()), float(np.abs(whole).max()))


def exceeds(gates: Sequence[Gate], measurements: Sequence[Measurement]) -> bool:
    """Whether one of the levels misses its bound by a finite figure."""
    bounds = {gate.metric: gate.max for gate in gates if gate.max is not None}
    return any(
        m.metric in LEVELS and m.value is not None and bounds.get(m.metric, np.inf) < m.value < np.inf
        for m in measurements
    )


def allow_rounding(measurements: Sequence[Measurement], found: Conditioning) -> list[Measurement]:
    """The measurements, those of the levels with the tolerance that the original's own rounding gives."""
    told = (
        f"the original differs from itself by {found.difference:.2g} between one pass and single steps, "
        f"with logits up to {found.largest:.3g}: {found.tolerance:.2g} is put down to rounding"
    )
    return [
        m.model_copy(update={"tolerance": found.tolerance, "detail": f"{m.detail}; {told}"})
        if m.metric in LEVELS and m.value is not None
        else m
        for m in measurements
    ]
