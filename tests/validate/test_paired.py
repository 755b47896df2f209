"""The served program beside the exact one: size and evenness of what rounding adds."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from llmc.config import Metric
from llmc.validate.paired import Paired

Array = np.ndarray
M = Metric
VOCABULARY = 50


@dataclass
class Noisy:
    """A session whose logits are a function of the tokens so far, plus some noise of its own."""

    interface: Any
    noise: float
    worst: float = 1.0
    where: str = "here"
    masked: float = 0.0

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        exact = np.random.default_rng(int(input_ids.sum())).normal(size=(*input_ids.shape, VOCABULARY))
        noise = np.random.default_rng(int(input_ids.sum()) + 1).normal(size=exact.shape) * self.noise
        noise[0, -1] *= self.worst if input_ids.shape[1] == 8 else 1.0
        made: Array = exact + noise + (self.noise > 0)  # a shift of all logits moves no probability
        if self.masked:
            made[..., :30] = self.masked
        return made.astype(np.float32)

    decode: Any = None


def pair(noise: float, worst: float = 1.0, *, routed: bool = False) -> dict[Metric, float | None]:
    made = Paired(Noisy(None, 0.0), Noisy(None, noise, worst), routed)
    for seed in range(40):
        made.prefill(np.full((1, 7 + seed % 3), seed), steps=0)
    return {m.metric: m.value for m in made.measure()}


def test_even_noise_has_its_size_and_ratios_near_one() -> None:
    found = pair(0.03)
    assert found[M.ROUNDING_NOISE_RATIO] == pytest.approx(0.03, rel=0.1)
    assert found[M.ROUNDING_KL_MEAN] == pytest.approx(0.03**2 / 2, rel=0.3)
    assert found[M.ROUNDING_KL_RATIO] == pytest.approx(1.0, rel=0.2)
    assert 1 < (found[M.ROUNDING_POSITION_RATIO] or 0) < 2
    assert 1 < (found[M.ROUNDING_TOKEN_RATIO] or 0) < 2


@pytest.mark.parametrize("routed", [False, True])
def test_one_length_of_a_piece_that_is_wrong_stands_out(routed: bool) -> None:
    ratio = pair(0.03, 100.0, routed=routed)[M.ROUNDING_POSITION_RATIO] or 0
    assert ratio < 2 if routed else ratio > 50  # with a router, of 112 positions 13 are no median


@pytest.mark.parametrize("size", [0.01, 0.1])
def test_a_few_positions_that_are_wrong_stand_out_in_divergence_whatever_the_noise(size: float) -> None:
    assert (pair(size, 20.0)[M.ROUNDING_KL_RATIO] or 0) > 10


@pytest.mark.parametrize(("worst", "low", "high"), [(1.0, 0.5, 2.0), (20.0, 0.5, 2.0)])
def test_with_a_router_single_positions_do_not_count(worst: float, low: float, high: float) -> None:
    assert low < (pair(0.03, worst, routed=True)[M.ROUNDING_KL_RATIO] or 0) < high


@dataclass
class Turning(Noisy):
    """A session with ten times the noise at a seventh of the positions, and at some of 13 tokens' calls."""

    turned: int = 0

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        number, sequence = int(input_ids[0, 0]), input_ids.shape[1]
        exact, noise = (np.random.default_rng(2 * number + i).normal(size=(1, 1, VOCABULARY)) for i in (0, 1))
        turns = number % 7 == 0 or (sequence == 13 and number < 30 * self.turned)
        made = exact + self.noise * (10.0 if turns else 1.0) * noise
        return np.asarray(made, np.float32)


@pytest.mark.parametrize(("turned", "low", "high"), [(4, 0.5, 5.0), (6, 50.0, 200.0)])
def test_near_ties_of_a_router_are_no_fault_of_a_length_unless_all_of_it_moves(
    turned: int, low: float, high: float
) -> None:
    """Each of 30 lengths has 6 positions; by chance rounding turns 4 of one."""
    made = Paired(Turning(None, 0.0), Turning(None, 0.03, turned=turned), routed=True)
    for number in range(180):
        made.prefill(np.full((1, 5 + number % 30), number), steps=0)
    found = {m.metric: m.value or 0 for m in made.measure()}
    assert low < found[M.ROUNDING_KL_RATIO] < high
    assert found[M.ROUNDING_POSITION_RATIO] == pytest.approx(found[M.ROUNDING_KL_RATIO] ** 0.5, rel=0.5)


def test_equal_programs_have_no_noise() -> None:
    assert list(pair(0.0).values()) == [0.0, 1.0, 0.0, 1.0, 1.0]


def test_padding_is_not_compared() -> None:
    made = Paired(Noisy(None, 0.0), Noisy(None, 0.03, 1e6))
    made.prefill(np.ones((1, 8), np.int64), np.array([[1] * 7 + [0]]), steps=0)
    assert (made.measure()[3].value or 0) < 3


def test_where_nothing_was_compared_every_figure_is_nan() -> None:
    assert all(np.isnan(m.value or 0) for m in Paired(Noisy(None, 0.0), Noisy(None, 0.0)).measure())


@pytest.mark.parametrize("lowest", [float(np.finfo(np.float32).min), -np.inf, -65504.0])
def test_tokens_that_are_never_chosen_do_not_count(lowest: float) -> None:
    made = Paired(Noisy(None, 0.0, masked=lowest), Noisy(None, 0.03, masked=lowest))
    for seed in range(40):
        made.prefill(np.full((1, 7 + seed % 3), seed), steps=0)
    found = {m.metric: m.value or 0 for m in made.measure()}
    assert found[M.ROUNDING_NOISE_RATIO] == pytest.approx(0.03, rel=0.1)
    assert found[M.ROUNDING_KL_RATIO] == pytest.approx(1.0, rel=0.2)
    assert 1 < found[M.ROUNDING_TOKEN_RATIO] < 2


def test_a_token_that_only_one_program_masks_counts() -> None:
    made = Paired(Noisy(None, 0.0), Noisy(None, 0.03, masked=-65504.0))
    made.prefill(np.ones((1, 8), np.int64), steps=0)
    assert (made.measure()[2].value or 0) > 100
