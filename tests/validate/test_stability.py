"""Rounding explains the positions that it moves as far, and a fault at any other stays one."""

from typing import Any

import numpy as np
import pytest

from llmc.config import Metric
from llmc.validate.measure import measured
from llmc.validate.positions import ReferencePass
from llmc.validate.sensitivity import Sensitivity
from llmc.validate.stability import LogitDifference, allow_rounding

METRIC = Metric.DECODE_MAX_ABS
BOUND = 1e-3
PASSES = [
    ReferencePass(np.arange(100), (60, 40), np.arange(100)),
    ReferencePass(np.arange(60).reshape(2, 30), (), np.arange(30)),
]


class Original:
    """One whose rounding moves some positions; logits up to 100."""

    def __init__(self, moved: dict[int, float]) -> None:
        self.moved = moved
        self.asked: list[tuple[int, tuple[int, ...]]] = []

    def sensitivity(
        self, input_ids: np.ndarray, positions: np.ndarray, *, pieces: tuple[int, ...] = ()
    ) -> Sensitivity:
        self.asked.append((len(input_ids), pieces))
        moved = np.array([self.moved.get(int(at), 1e-6) for at in positions])
        return Sensitivity(moved, moved, np.full(len(positions), 100.0))


def judge(
    differences: dict[int, float], original: Any, reference_pass: int = 0, row: int = 0
) -> float | None:
    every = dict.fromkeys(range(100), 1e-05) | differences
    found = [LogitDifference(METRIC, reference_pass, row, at, value) for at, value in every.items()]
    level = measured(METRIC, max(every.values()), "steps", "here")
    allowed = allow_rounding([level], {METRIC: BOUND}, found, PASSES, original)
    assert allowed[0].value == level.value
    return allowed[0].tolerance


@pytest.mark.parametrize(
    ("differences", "moved", "explained"),
    [
        ({70: 2.0}, {70: 2.1}, True),
        ({70: 2.0}, {70: 1.9}, False),
        ({70: 2.0, 20: 0.5}, {70: 2.1}, False),  # one of two is not explained
        (dict.fromkeys(range(6), 2.0), dict.fromkeys(range(6), 2.1), False),  # more than 5 % are torn
        (dict.fromkeys(range(50), 0.08), dict.fromkeys(range(50), 0.09), True),  # all of them move a little
        ({70: 9e-4}, {}, None),
    ],
)
def test_what_rounding_explains(
    differences: dict[int, float], moved: dict[int, float], explained: bool | None
) -> None:
    original = Original(moved)
    assert judge(differences, original) == (max(differences.values()) if explained else None)
    assert bool(original.asked) is (explained is not None)


def test_a_bound_below_rounding_is_held_as_it_stands() -> None:
    original = Original({70: 0.05})
    level = measured(METRIC, 9e-4, "steps", "here")
    found = [LogitDifference(METRIC, 0, 0, 70, 9e-4)]
    assert allow_rounding([level], {METRIC: 9e-5}, found, PASSES, original) == (level,)
    assert original.asked == []
    (allowed,) = allow_rounding([level], {METRIC: 1e-4}, found, PASSES, original)
    assert allowed.tolerance == 9e-4


def test_a_fault_costs_one_short_pass() -> None:
    original = Original({})
    judge({70: 2.0, 5: 1.0, 90: 3.0}, original)
    assert original.asked == [(6, (6,))]


def test_the_text_is_cut_behind_the_last_position() -> None:
    original = Original({5: 2.0, 70: 2.0})
    assert judge({5: 2.0, 70: 2.0}, original) == 2.0
    assert original.asked == [(6, (6,)), (71, (60, 11))]


def test_rows_of_a_batch_are_asked_alone() -> None:
    original = Original({7: 2.0})
    assert judge({7: 2.0}, original, reference_pass=1, row=1) == 2.0
    assert original.asked[0] == (8, ())
