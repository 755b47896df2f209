"""A slow-down is found, and a noisy machine alone is none."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.artifact.verdict import CheckStatus
from llmc.config import Gate, Metric
from llmc.runtime.ort_model import OrtModel
from llmc.validate.gates import evaluate
from llmc.validate.rival import Pairing, Turn, compare_turns, measure_rival, median_interval

from .decoder import Variant, write_decoder

GATE = Gate(metric=Metric.PREVIOUS_RATIO, max=1.05, reason="not slower than the release before")


class Slowed(OrtModel):
    """The same artifact with 5 ms before every step, some ten times what the step takes."""

    def next_tokens(self, tokens: np.ndarray) -> np.ndarray:
        time.sleep(0.005)
        return super().next_tokens(tokens)


def test_an_artifact_slowed_by_a_large_factor_fails_the_gate(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path, Variant(logits="last"))
    settings: dict[str, Any] = {"threads": 1, "share_buffer": False}
    model, slow = (partial(kind, tmp_path, interface, **settings) for kind in (OrtModel, Slowed))
    short = Pairing(least=6, most=6, rounds=1)
    made = measure_rival(slow, model, np.arange(5, 13), short)
    assert made.value is not None
    assert made.value > 3
    assert evaluate([GATE], [made]).checks[0].status is CheckStatus.FAIL
    assert "median of 12 pairs of sessions, turns of 8 steps after 8 tokens" in made.detail
    faster = measure_rival(model, slow, np.arange(5, 13), short)
    assert evaluate([GATE], [faster]).checks[0].status is CheckStatus.PASS


def simulated(random: np.random.Generator, milliseconds: float) -> Callable[[], Turn]:
    """The fastest of eight steps on a machine that is often interrupted; each session is placed by chance."""

    def opened() -> Turn:
        placed = milliseconds * random.normal(1, 0.02)
        return lambda: turn(placed)

    def turn(milliseconds: float) -> float:
        steps = milliseconds * random.normal(1, 0.02, 8) + random.exponential(0.2 * milliseconds, 8)
        interrupted = random.random(8) < 0.3
        return float(np.min(steps + interrupted * random.exponential(3 * milliseconds, 8)))

    return opened


@pytest.mark.parametrize(("slower", "fewest", "most"), [(1.0, 0, 0), (1.1, 19, 20)])
def test_of_twenty_runs_on_a_noisy_machine(slower: float, fewest: int, most: int) -> None:
    random = np.random.default_rng(11)
    failed = 0
    for _ in range(20):
        found = compare_turns(simulated(random, 10.0), simulated(random, 10.0 * slower), Pairing())
        assert found.low <= found.ratio <= found.high
        failed += found.low > 1.05
    assert fewest <= failed <= most


def test_the_session_that_is_made_first_has_no_advantage() -> None:
    made: list[float] = []

    def opened() -> Turn:
        made.append(1.0 + 0.1 * (len(made) % 2))  # the second of each pair is slower
        return partial(float, made[-1])

    found = compare_turns(opened, opened, Pairing())
    assert (found.low, found.high) == (pytest.approx(1), pytest.approx(1))


def test_more_pairs_are_taken_on_a_noisier_machine() -> None:
    random = np.random.default_rng(2)
    steady = compare_turns(lambda: lambda: 1.0, lambda: lambda: 1.5, Pairing())
    assert (steady.pairs, steady.ratio, steady.low) == (16, pytest.approx(1.5), pytest.approx(1.5))
    noisy = compare_turns(simulated(random, 1.0), simulated(random, 1.0), Pairing())
    assert noisy.pairs > 16
    hopeless = Pairing(most=20)
    wild = compare_turns(lambda: lambda: float(random.exponential(1)), lambda: lambda: 1.0, hopeless)
    assert wild.pairs == 40
    assert wild.high - wild.low > 0.04


def test_the_interval_of_a_median_covers_it() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        _, low, high = median_interval(random.exponential(1, 25).tolist())
        covered += low <= np.log(2) <= high
    assert covered >= 0.94 * 400
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (3.5, 1.0, 6.0)
