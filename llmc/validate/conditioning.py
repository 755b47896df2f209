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
#: Tokens before the steps that are compared, and how many steps: those of the decode level.
PROMPTS, STEPS = (1, 16, 100), 64
#: How many times the original's own difference is let through, which other sums of the same terms may reach.
_TIMES = 4.0
#: Logits. What is put down to rounding is at least this: a model that rounding moves by less than a quarter
#: of it is held to its bounds as they are.
_LEAST = 1e-3
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
        """Largest difference of a logit that is put down to rounding; 0 for a model that it hardly moves."""
        found = min(_TIMES * self.difference, _MOST * self.largest)
        return found if found >= _LEAST else 0.0


def measure_conditioning(model: TorchModel, tokens: Array, limit: int | None) -> Conditioning:
    """Compare the original's one pass over its own greedy text with the same text in single steps.

    Args:
        tokens: The evaluation text (n,) int64, of which prompts are cut.
        limit: Most positions of the model; None for any number.
    """
    difference = largest = 0.0
    for length in PROMPTS:
        steps = STEPS if limit is None else min(STEPS, limit - length)
        if steps < 1:
            continue
        prompt = np.take(tokens, np.arange(length, 2 * length), mode="wrap")
        sequence = np.concatenate([prompt, model.greedy(prompt, steps)])
        whole = model.logits(sequence, keep=steps)
        stepped = model.stepped_logits(sequence, keep=steps)
        difference = max(difference, float(np.abs(whole - stepped).max()))
        largest = max(largest, float(np.abs(whole).max()))
    return Conditioning(difference, largest)


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
        if m.metric in LEVELS and m.value is not None and found.tolerance > 0
        else m
        for m in measurements
    ]
