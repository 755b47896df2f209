"""Decode speed of an artifact against an earlier one, so that a slow-down of a few percent is found.

Both sessions live in one process and take short turns in the order A B B A, so that whatever drifts weighs
on both. Of each turn the fastest step counts: other work on the machine only ever adds time. The ratio is
the median over pairs of turns, its confidence interval that of a median by order statistics, which asks
nothing of the distribution (Conover 1999, Practical Nonparametric Statistics, 3.2). Pairs are taken until
the interval is narrow enough, or until it is told that the machine is too noisy.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from llmc.artifact.verdict import Measurement
from llmc.config import Metric
from llmc.validate.interval import CONFIDENCE
from llmc.validate.measure import measured
from llmc.validate.session import OrtModel

Array = np.ndarray
Turn = Callable[[], float]

#: Tokens in the cache before a turn.
CONTEXT = 128


@dataclass(frozen=True)
class Pairing:
    """How long to measure.

    Args:
        least: Pairs of turns that are taken in any case.
        most: Pairs after which it ends whatever is known by then.
        precision: Half width of the interval, as a fraction of the ratio, that is narrow enough.
    """

    least: int = 24
    most: int = 400
    precision: float = 0.02


@dataclass(frozen=True)
class Rivalry:
    """Ratio of B to A with its confidence interval, from `pairs` pairs of turns."""

    ratio: float
    low: float
    high: float
    pairs: int


def compare_turns(a: Turn, b: Turn, pairing: Pairing) -> Rivalry:
    """Ratio of the times of two things done in turn.

    Args:
        a: Does its turn and returns the time of its fastest step.
        b: Likewise.
    """
    a(), b()  # warm-up
    logs: list[float] = []
    while True:
        first, second, third, fourth = a(), b(), b(), a()
        logs += [math.log(second / first), math.log(third / fourth)]
        if len(logs) < pairing.least:
            continue
        value, low, high = median_interval(logs)
        if high - low <= 2 * pairing.precision or len(logs) >= pairing.most:
            return Rivalry(math.exp(value), math.exp(low), math.exp(high), len(logs))


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and a confidence interval of it by order statistics; at least six values."""
    ordered = sorted(values)
    count = len(ordered)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    below = max(0, math.floor((count - z * math.sqrt(count)) / 2))
    return float(np.median(ordered)), ordered[below], ordered[count - 1 - below]


def decode_turn(model: OrtModel, prompt: Array, steps: int = 8) -> Turn:
    """A turn of `steps` decode steps after `prompt` (sequence,), always from the same point."""
    model.prefill(prompt[None], steps=steps)
    point = model.state()
    token = np.array([[1]])

    def turn() -> float:
        model.restore(point)
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            model.decode(token)
            times.append(time.perf_counter() - start)
        return min(times)

    return turn


def measure_rival(model: OrtModel, previous: OrtModel, prompt: Array, pairing: Pairing) -> Measurement:
    """PREVIOUS_RATIO: inter-token latency of an artifact over that of an earlier one."""
    found = compare_turns(decode_turn(previous, prompt), decode_turn(model, prompt), pairing)
    detail = f"median of {found.pairs} pairs of turns of 8 steps after {len(prompt)} tokens"
    interval = (found.low, found.high)
    return measured(Metric.PREVIOUS_RATIO, found.ratio, detail, model.where, interval=interval)
