"""Compare the decode speed of an artifact with an earlier one's, to detect a slow-down of a few percent.

Two sessions live in one process and take short turns in the order A B B A, so that drift affects both. The
fastest step of each turn counts: other work on the machine can only add time. The location of a session's
memory makes it faster or slower for as long as it lives (two sessions of one artifact differed by 9 %), and
the order of creation decides the location: a sample is therefore the mean of two pairs of sessions, one
created in either order, and many samples are taken. The ratio is the median over samples; its confidence
interval is that of a median by order statistics, which assumes nothing about the distribution (Conover 1999,
Practical Nonparametric Statistics, 3.2). Samples are taken until the interval is narrow enough, or their
maximum number is reached.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement
from llmc.config import Metric
from llmc.runtime.session import Rewindable
from llmc.validate.interval import CONFIDENCE
from llmc.validate.measure import measured

Turn = Callable[[], float]
Open = Callable[[], Rewindable]

#: Number of tokens in the cache before a turn.
CONTEXT = 128


@dataclass(frozen=True)
class Pairing:
    """The limits of a measurement.

    Args:
        least: Minimum number of samples.
        most: Maximum number of samples, after which the measurement ends whatever its precision.
        rounds: Times that both sessions of a pair take two turns.
        precision: Half width of the interval, as a fraction of the ratio, that is narrow enough.
    """

    least: int = 8
    most: int = 40
    rounds: int = 3
    precision: float = 0.02


@dataclass(frozen=True)
class Rivalry:
    """The ratio of B to A with its confidence interval, from `pairs` pairs of sessions, two per sample."""

    ratio: float
    low: float
    high: float
    pairs: int


def compare_turns(open_a: Callable[[], Turn], open_b: Callable[[], Turn], pairing: Pairing) -> Rivalry:
    """Measure the ratio of the times of two things that run in turn.

    Args:
        open_a: Opens a session of A; its turn returns the time of its fastest step.
        open_b: Does the same for B.
    """
    logs: list[float] = []
    while True:
        forth = _log_ratio(open_a, open_b, pairing.rounds)
        logs.append((forth - _log_ratio(open_b, open_a, pairing.rounds)) / 2)
        if len(logs) < pairing.least:
            continue
        value, low, high = median_interval(logs)
        if high - low <= 2 * pairing.precision or len(logs) >= pairing.most:
            return Rivalry(math.exp(value), math.exp(low), math.exp(high), 2 * len(logs))


def _log_ratio(open_first: Callable[[], Turn], open_second: Callable[[], Turn], rounds: int) -> float:
    """Return the log ratio of the second side's times to the first's; the first side is opened first."""
    one, two = open_first(), open_second()
    one(), two()  # warm-up
    logs: list[float] = []
    for _ in range(rounds):
        first, second, third, fourth = one(), two(), two(), one()
        logs += [math.log(second / first), math.log(third / fourth)]
    return float(np.median(logs))


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median and its confidence interval by order statistics; at least six values."""
    ordered = sorted(values)
    count = len(ordered)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    below = max(0, math.floor((count - z * math.sqrt(count)) / 2))
    return float(np.median(ordered)), ordered[below], ordered[count - 1 - below]


def decode_turn(model: Rewindable, prompt: Array, steps: int = 8) -> Turn:
    """Return a turn of `steps` decode steps after `prompt` (sequence,), always from the same point."""
    model.prefill(prompt[None], steps=steps)
    point = model.state()
    token = np.array([1])

    def turn() -> float:
        model.restore(point)
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            model.next_tokens(token)
            times.append(time.perf_counter() - start)
        return min(times)

    return turn


def prefill_turn(model: Rewindable, prompt: Array) -> Turn:
    """Return a turn of one prefill of `prompt` (sequence,)."""

    def turn() -> float:
        start = time.perf_counter()
        model.prefill(prompt[None], steps=1)
        return time.perf_counter() - start

    return turn


def measure_rival(model: Open, previous: Open, prompt: Array, pairing: Pairing) -> Measurement:
    """Measure PREVIOUS_RATIO: inter-token latency of an artifact over an earlier one's."""
    where = ""

    def opened(make: Open) -> Turn:
        nonlocal where
        session = make()
        where = session.where
        return decode_turn(session, prompt)

    rivalry = compare_turns(lambda: opened(previous), lambda: opened(model), pairing)
    detail = f"median of {rivalry.pairs} pairs of sessions, turns of 8 steps after {len(prompt)} tokens"
    interval = (rivalry.low, rivalry.high)
    return measured(Metric.PREVIOUS_RATIO, rivalry.ratio, detail, where, interval=interval)
