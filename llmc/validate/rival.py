"""Decode speed of an artifact against an earlier one, so that a slow-down of a few percent is found.

Two sessions live in one process and take short turns in the order A B B A, so that whatever drifts weighs on
both. Of each turn the fastest step counts: other work on the machine only ever adds time. Where a session's
memory lies makes it faster or slower for as long as it lives (two sessions of one artifact differed by 9 %),
and which one was made first tells where: so a sample is the mean of two pairs of sessions, one made in either
order, and many are made. The ratio is the median over samples, its confidence interval that of a median by
order statistics, which asks nothing of the distribution (Conover 1999, Practical Nonparametric Statistics,
3.2). Samples are taken until the interval is narrow enough, or there are as many as are allowed.
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

#: Tokens in the cache before a turn.
CONTEXT = 128


@dataclass(frozen=True)
class Pairing:
    """How long to measure.

    Args:
        least: Samples that are taken in any case.
        most: Samples after which it ends whatever is known by then.
        rounds: Times that both sessions of a pair take two turns.
        precision: Half width of the interval, as a fraction of the ratio, that is narrow enough.
    """

    least: int = 8
    most: int = 40
    rounds: int = 3
    precision: float = 0.02


@dataclass(frozen=True)
class Rivalry:
    """Ratio of B to A with its confidence interval, from `pairs` pairs of sessions, two a sample."""

    ratio: float
    low: float
    high: float
    pairs: int


def compare_turns(open_a: Callable[[], Turn], open_b: Callable[[], Turn], pairing: Pairing) -> Rivalry:
    """Ratio of the times of two things done in turn.

    Args:
        open_a: Makes a session of A ready; its turn returns the time of its fastest step.
        open_b: Likewise.
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
    """Of the second's times to the first's, the first made first."""
    one, two = open_first(), open_second()
    one(), two()  # warm-up
    logs: list[float] = []
    for _ in range(rounds):
        first, second, third, fourth = one(), two(), two(), one()
        logs += [math.log(second / first), math.log(third / fourth)]
    return float(np.median(logs))


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and a confidence interval of it by order statistics; at least six values."""
    ordered = sorted(values)
    count = len(ordered)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    below = max(0, math.floor((count - z * math.sqrt(count)) / 2))
    return float(np.median(ordered)), ordered[below], ordered[count - 1 - below]


def decode_turn(model: Rewindable, prompt: Array, steps: int = 8) -> Turn:
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


def prefill_turn(model: Rewindable, prompt: Array) -> Turn:
    """A turn of one prefill of `prompt` (sequence,)."""

    def turn() -> float:
        start = time.perf_counter()
        model.prefill(prompt[None], steps=1)
        return time.perf_counter() - start

    return turn


def measure_rival(model: Open, previous: Open, prompt: Array, pairing: Pairing) -> Measurement:
    """PREVIOUS_RATIO: inter-token latency of an artifact over that of an earlier one."""
    where = ""

    def opened(make: Open) -> Turn:
        nonlocal where
        session = make()
        where = session.where
        return decode_turn(session, prompt)

    found = compare_turns(lambda: opened(previous), lambda: opened(model), pairing)
    detail = f"median of {found.pairs} pairs of sessions, turns of 8 steps after {len(prompt)} tokens"
    interval = (found.low, found.high)
    return measured(Metric.PREVIOUS_RATIO, found.ratio, detail, where, interval=interval)
