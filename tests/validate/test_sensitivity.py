"""Positions that rounding alone moves are found, and only as many are left out as a good model may have."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.artifact.store.cache import StageCache
from llmc.config import Metric
from llmc.runtime.ort_model import OrtModel
from llmc.validate.quality import measure_quality, plan_windows
from llmc.validate.reference import TorchModel
from llmc.validate.remembered import RememberedModel
from llmc.validate.sensitivity import Sensitivity, find_unstable, measure_sensitivity

from .conftest import build
from .decoder import Variant, write_decoder

BOUND = 1e-6


class Known:
    """An original whose windows are unstable at the positions given by their first token."""

    def __init__(self, unstable: dict[int, int]) -> None:
        self.unstable, self.asked = unstable, 0

    def sensitivity(self, input_ids: np.ndarray, positions: np.ndarray, **_: Any) -> Sensitivity:
        self.asked += 1
        moved = np.full(len(positions), 1e-12)
        if int(input_ids[0]) in self.unstable:
            moved[self.unstable[int(input_ids[0])]] = 1.0
        return Sensitivity(moved, moved, moved)


@pytest.fixture(scope="module")
def torn() -> Any:
    """A model whose attention weighs scores of thousands, so that near ties decide its logits."""
    model = build("LlamaConfig")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(3000)
    return model


def test_a_trained_model_is_stable_everywhere(llama: Any, tokens: np.ndarray) -> None:
    found = measure_sensitivity(llama, lambda: TorchModel(llama).logits(tokens[:100], keep=80))
    assert found.logits.shape == found.kl.shape == (80,)
    assert 0 < found.logits.max() < 1e-4
    assert found.kl.max() < 1e-9


def test_near_ties_move_single_positions(torn: Any, tokens: np.ndarray) -> None:
    found = measure_sensitivity(torn, lambda: TorchModel(torn).logits(tokens[:200], keep=190))
    assert found.logits.max() > 100 * np.median(found.logits)
    assert torn(torch.from_numpy(tokens[None, :9])).logits.isfinite().all()  # no hook stays


@pytest.mark.parametrize(("others", "asked", "left_out"), [((), 2, 1), ((1,), 2, 2), ((1, 2, 3), 4, 0)])
def test_only_a_few_positions_are_left_out(others: tuple[int, ...], asked: int, left_out: int) -> None:
    windows, kl = np.tile(np.arange(4)[:, None], (1, 16)), np.zeros((4, 15))
    kl[0, 3] = 2.0
    kl[list(others), 5] = 0.5
    if not others:
        kl[1, 5] = 0.5  # a fault: nothing explains it
    original = Known({0: 3} | dict.fromkeys(others, 5))
    found = find_unstable(original, windows, kl, BOUND)
    assert found.sum() == left_out
    assert original.asked == asked


def test_what_rounding_decides_does_not_count(torn: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    """A right artifact of a torn model passes, and one with a damaged matrix does not."""
    original = TorchModel(torn)
    known = RememberedModel(lambda: original, StageCache(tmp_path / "cache"), {}, None)
    found = {}
    for name, variant in {
        "right": Variant(logits="last", max_length=64),
        "wrong": Variant(
            logits="last", max_length=64, scale_weight=("model.layers.1.mlp.down_proj.weight", 1.01)
        ),
    }.items():
        folder = tmp_path / name
        model = OrtModel(folder, write_decoder(torn, folder, variant), threads=1, share_buffer=False)
        windows = plan_windows(model.interface, tokens, ())
        made = measure_quality(model, original, windows, unstable=(known, BOUND))
        found[name] = next(m for m in made if m.metric is Metric.TEXT_KL_MEAN)
    assert found["right"].value < BOUND < found["wrong"].value
