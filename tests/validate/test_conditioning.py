"""What the original's own rounding explains is let through, and nothing beyond it."""

from typing import Any

import numpy as np
import pytest
import torch

from llmc.artifact.verdict import CheckStatus
from llmc.config import Gate, Metric
from llmc.validate.conditioning import Conditioning, allow_rounding, exceeds, measure_conditioning
from llmc.validate.gates import evaluate
from llmc.validate.measure import measured
from llmc.validate.reference import TorchModel

from .conftest import build

GATE = Gate(metric=Metric.DECODE_MAX_ABS, max=1e-3, reason="a bound for the test")


def judge(value: float, found: Conditioning) -> CheckStatus:
    made = allow_rounding([measured(Metric.DECODE_MAX_ABS, value, "steps", "here")], found)
    return evaluate([GATE], made).checks[0].status


@pytest.mark.parametrize(
    ("value", "difference", "largest", "passes"),
    [
        (2e-3, 1e-3, 30.0, True),
        (5e-3, 1e-3, 30.0, False),  # more than four times
        (2e-3, 1e-3, 1.0, False),  # a thousandth of the largest logit is the most
        (2e-3, 1e-5, 30.0, False),
        (9e-4, 0.0, 30.0, True),  # the bound itself stays
        (1.1e-3, 2.4e-4, 30.0, False),  # a model that rounding hardly moves
    ],
)
def test_what_is_put_down_to_rounding(value: float, difference: float, largest: float, passes: bool) -> None:
    assert (judge(value, Conditioning(difference, largest)) is CheckStatus.PASS) is passes


def test_it_is_asked_only_where_a_bound_is_missed() -> None:
    def decode(value: float) -> list[Any]:
        return [measured(Metric.DECODE_MAX_ABS, value, "steps", "here")]

    assert exceeds([GATE], decode(2e-3))
    assert not exceeds([GATE], decode(1e-4))
    assert not exceeds([GATE], decode(float("nan")))
    assert not exceeds([GATE], [measured(Metric.TEXT_KL_MEAN, 2.0, "", "here")])


def test_a_trained_model_is_hardly_moved(llama: Any, tokens: np.ndarray) -> None:
    found = measure_conditioning(TorchModel(llama), tokens, 256)
    assert 0 < found.difference < 1e-5
    assert found.tolerance == 0


def test_a_model_of_large_logits_is_moved_more(tokens: np.ndarray) -> None:
    model = build("LlamaConfig")
    small = measure_conditioning(TorchModel(model), tokens, None)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    large = measure_conditioning(TorchModel(model), tokens, None)
    assert large.largest == pytest.approx(1000 * small.largest, rel=1e-3)
    assert large.difference > 100 * small.difference
