"""The original's steps beside its own pass: how far they are apart, and what the user is told."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.artifact.store.cache import StageCache
from llmc.artifact.verdict import MeasurementStatus
from llmc.config import Metric
from llmc.errors import ResourceError
from llmc.validate.gates import evaluate
from llmc.validate.itself import PREFIX, ROWS, STEPS, OwnDistance, differs, measure_itself
from llmc.validate.reference import TorchModel
from llmc.validate.remembered import RememberedModel

from .test_remembered import refuse

HELD = "the artifact is therefore compared with its one pass"
LIMIT = 256
TEXT = np.random.default_rng(0).integers(3, 250, 300)


def _remembered(model: Any, folder: Path) -> RememberedModel:
    return RememberedModel(lambda: TorchModel(model), StageCache(folder / "reference"), {}, None)


def _with_other_steps(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The model with a second program for single steps."""
    other = copy.deepcopy(model)

    def program(_: Any, __: Any, hidden: torch.Tensor) -> torch.Tensor:
        return change(hidden) if hidden.shape[1] == 1 else hidden

    other.model.norm.register_forward_hook(program)
    return other


def _fail(hidden: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel for a step")


def test_a_model_with_one_function_is_as_far_from_itself_as_rounding(llama: Any, tmp_path: Path) -> None:
    found = measure_itself(_remembered(llama, tmp_path), LIMIT, TEXT, (), STEPS)
    assert found.value is not None
    assert 0 < found.value < 1e-4
    assert found.detail.startswith("the original decodes as in its own one pass, within ")
    assert found.detail.endswith(f"{ROWS * STEPS} positions")
    assert not differs(found)
    recalled = RememberedModel(refuse, StageCache(tmp_path / "reference"), {}, None)
    assert measure_itself(recalled, LIMIT, TEXT, (), STEPS) == found


def test_the_distance_of_two_functions_is_stated(llama: Any, tmp_path: Path) -> None:
    model, scale = _with_other_steps(llama, lambda hidden: 1.5 * hidden), 0.5
    found = measure_itself(_remembered(model, tmp_path), LIMIT, TEXT, (), STEPS)
    rows = np.take(TEXT, np.arange(ROWS)[:, None] * (300 // ROWS) + np.arange(PREFIX + STEPS), mode="wrap")
    with torch.inference_mode():
        logits = llama(torch.from_numpy(rows)).logits[:, PREFIX:].abs()
    assert found.value == pytest.approx(scale * float(logits.max()), rel=1e-4)
    assert found.figures[f"after_{PREFIX + 1}_tokens"] == pytest.approx(
        scale * float(logits[:, 0].max()), rel=1e-4
    )
    assert f"logits off its own one pass over {ROWS * STEPS} positions; {HELD}" in found.detail
    assert differs(found)


def test_another_choice_of_tokens_is_counted(llama: Any, tmp_path: Path) -> None:
    model = _with_other_steps(llama, torch.neg)
    found = measure_itself(_remembered(model, tmp_path), LIMIT, TEXT, (), STEPS)
    assert found.figures["other_choices"] == ROWS * STEPS
    assert f" and prefers another token at {ROWS * STEPS} of them; {HELD}" in found.detail


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda hidden: hidden * np.nan, "the original decodes to NaN or infinity within 64 positions"),
        (_fail, "the original fails in PyTorch at a step of 25 tokens: RuntimeError: no kernel for a step"),
    ],
)
def test_steps_that_fail_are_no_fault_of_the_artifact(
    change: Callable[[torch.Tensor], torch.Tensor], says: str, llama: Any, tmp_path: Path
) -> None:
    found = measure_itself(_remembered(_with_other_steps(llama, change), tmp_path), LIMIT, TEXT, (), STEPS)
    assert (found.value, found.status) == (None, MeasurementStatus.NOT_MEASURED)
    assert found.detail.startswith(says)
    assert found.detail.endswith(HELD)
    assert differs(found)
    assert evaluate((), [found]).passed


def test_memory_that_runs_out_in_the_original_is_no_property_of_it(llama: Any) -> None:
    model = _with_other_steps(llama, lambda hidden: hidden + torch.empty(1 << 50))
    with pytest.raises(ResourceError, match="PyTorch ran out of memory at a step of ") as caught:
        TorchModel(model).logits_at(TEXT[:8], np.array([7]), pieces=(7, 1))
    assert caught.value.hint is not None


class Recorder:
    """Records what it is asked."""

    shape: tuple[int, ...] = ()
    pieces: tuple[int, ...] = ()

    def own_distance(self, input_ids: np.ndarray, pieces: Sequence[int]) -> OwnDistance:
        self.shape, self.pieces = input_ids.shape, tuple(pieces)
        return OwnDistance(np.zeros((ROWS, len(pieces) - 1)), np.zeros((ROWS, len(pieces) - 1)))


@pytest.mark.parametrize(
    ("limit", "switches", "pieces"),
    [
        (256, (), (PREFIX, *[1] * STEPS)),
        (6, (), (3, 1, 1, 1)),
        (None, (20, 90), (6, 6, *[1] * STEPS)),
        (2, (), (1, 1)),
        (1, (), ()),
    ],
)
def test_steps_fit_into_the_model_and_below_a_switch(
    limit: int | None, switches: tuple[int, ...], pieces: tuple[int, ...]
) -> None:
    asked = Recorder()
    found = measure_itself(asked, limit, TEXT, switches, STEPS)
    assert asked.pieces == pieces
    assert asked.shape == ((ROWS, sum(pieces)) if pieces else ())
    assert (found.status is MeasurementStatus.NOT_APPLICABLE) == (not pieces)
    assert found.metric is Metric.ORIGINAL_DECODE
