"""A right artifact passes every level; each sabotaged one fails exactly the levels that must see it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.artifact.verdict import CheckStatus, Measurement, MeasurementStatus
from llmc.config import Gate, Metric
from llmc.errors import ConfigError
from llmc.runtime.ort_model import OrtModel
from llmc.validate.gates import evaluate
from llmc.validate.positions import PromptBatch
from llmc.validate.quality import measure_quality, plan_windows
from llmc.validate.ragged import compare_ragged
from llmc.validate.reference import TorchModel

from .decoder import Variant, write_decoder
from .levels import parity_of, plan_of

PREFILL, DECODE, TOP1 = Metric.PREFILL_MAX_ABS, Metric.DECODE_MAX_ABS, Metric.DECODE_TOP1
CHUNKS, RAGGED, WINDOW = Metric.CHUNKS_MAX_ABS, Metric.RAGGED_MAX_ABS, Metric.WINDOW_MAX_ABS
KL, TEXT_TOP1, PERPLEXITY = Metric.TEXT_KL_MEAN, Metric.TEXT_TOP1, Metric.TEXT_PERPLEXITY_RATIO
UNGATED = {
    Metric.TEXT_KL_P99,
    Metric.TEXT_KL_MAX,
    Metric.TEXT_TOP5,
    Metric.TEXT_KL_RATIO,
}  # NaN fails without a gate
EVERY = {PREFILL, CHUNKS, DECODE, TOP1, RAGGED, WINDOW, KL, TEXT_TOP1, PERPLEXITY, *UNGATED}

WHY = "tiny random model in float32"
GATES = (
    *(Gate(metric=m, max=1e-4, reason=WHY) for m in (PREFILL, CHUNKS, DECODE, RAGGED, WINDOW)),
    Gate(metric=KL, max=1e-8, reason=WHY),
    *(Gate(metric=m, min=1.0, reason=WHY) for m in (TOP1, TEXT_TOP1)),
    Gate(metric=PERPLEXITY, max=1.00001, reason=WHY),
)


def take(
    original: Any,
    folder: Path,
    tokens: np.ndarray,
    variant: Variant,
    *,
    share: bool = False,
    text: bool = False,
) -> dict[Metric, Measurement]:
    interface = write_decoder(original, folder, variant)
    model = OrtModel(folder, interface, threads=1, share_buffer=share)
    reference = TorchModel(original)
    made = parity_of(model, reference, tokens).measure()
    if text:
        made += measure_quality(model, reference, plan_windows(interface, tokens, ()))
    return {m.metric: m for m in made}


def failures(found: dict[Metric, Measurement]) -> set[Metric]:
    gates = [g for g in GATES if g.metric in found]
    return {c.metric for c in evaluate(gates, list(found.values())).checks if c.status is CheckStatus.FAIL}


@pytest.mark.parametrize(
    ("variant", "share"),
    [
        (Variant(), False),
        (Variant(logits="last"), False),
        (Variant(position_ids=True, padding="left", logits="last"), False),
        (Variant(grouped=True, padding="right"), False),
        (Variant(grouped=True, padding="right", logits="last"), True),
    ],
    ids=["all", "last", "position-ids-left", "grouped", "grouped-shared-last"],
)
def test_a_right_artifact_passes(
    mistral: Any, tokens: np.ndarray, tmp_path: Path, variant: Variant, share: bool
) -> None:
    found = take(mistral, tmp_path, tokens, variant, share=share)
    assert failures(found) == set()
    assert all(m.status is MeasurementStatus.MEASURED for m in found.values())
    assert set(found) == {PREFILL, CHUNKS, DECODE, TOP1, RAGGED, WINDOW, Metric.POSITIONS}
    assert found[Metric.POSITIONS].value == 160
    assert "onnxruntime" in found[PREFILL].where


SABOTAGE = {
    "weight scaled by 1%": (Variant(scale_weight=("model.layers.1.mlp.down_proj.weight", 1.01)), None),
    "positions off by one in decode": (
        Variant(shift_decode_positions=True),
        {CHUNKS, DECODE, TOP1, RAGGED, WINDOW},
    ),
    "attention mask ignored": (Variant(ignore_mask=True, padding="left"), {RAGGED, WINDOW}),
    "sliding window ignored": (Variant(ignore_window=True), {PREFILL, CHUNKS, DECODE, TOP1, RAGGED, WINDOW}),
    "NaN in one logit": (Variant(nan_logit=True), EVERY),
    "vocabulary cut": (Variant(cut_vocabulary=3), EVERY),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_fails_the_levels_that_must_see_it(
    mistral: Any, tokens: np.ndarray, tmp_path: Path, name: str
) -> None:
    variant, expected = SABOTAGE[name]
    found = take(mistral, tmp_path, tokens, variant, text=expected in (None, EVERY))
    failed = failures(found)
    if expected is None:
        assert {PREFILL, CHUNKS, DECODE, RAGGED, WINDOW, KL} <= failed
        assert all(1e-4 < found[m].value < 1 for m in (PREFILL, CHUNKS, DECODE, RAGGED, WINDOW))
    else:
        assert failed == expected
    if expected == EVERY:
        assert all(math.isnan(m.value) for m in found.values() if m.metric is not Metric.POSITIONS)


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("at", [4, 5, 8], ids=["last prompt token", "first step", "last step"])
def test_every_row_is_compared_from_its_last_prompt_token_on(
    llama: Any, tokens: np.ndarray, tmp_path: Path, logits: str, side: str, at: int
) -> None:
    """A fault in one logit of the shorter row only must show."""
    interface = write_decoder(llama, tmp_path, Variant(logits=logits))
    model = OrtModel(tmp_path, interface, threads=1, share_buffer=False)
    batch = PromptBatch(np.stack([tokens[:13], tokens[20:33]]), prompts=(9, 5), steps=4)
    reference_pass = batch.reference_pass
    expected = TorchModel(llama).logits_at(reference_pass.tokens, reference_pass.positions)
    assert all(found.max() < 1e-4 for _, _, found in compare_ragged(model, batch, expected, side))
    expected[1, reference_pass.positions == at, 7] += 3.0
    worst = {
        (row, int(position)): float(value)
        for row, positions, found in compare_ragged(model, batch, expected, side)
        for position, value in zip(positions, found, strict=True)
    }
    assert [place for place, value in worst.items() if value > 1e-4] == [(1, at)]
    assert worst[1, at] == pytest.approx(3.0, abs=1e-3)


def test_the_last_slot_of_a_padded_row_is_not_its_last_token(
    llama: Any, tokens: np.ndarray, tmp_path: Path
) -> None:
    right = take(llama, tmp_path / "right", tokens, Variant(logits="last"), text=False)
    assert failures(right) == set()
    wrong = take(llama, tmp_path / "wrong", tokens, Variant(logits="last", last_slot=True), text=False)
    assert failures(wrong) == {RAGGED}


def test_details_name_the_fault(mistral: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    nan = take(mistral, tmp_path / "nan", tokens, Variant(nan_logit=True))
    assert "NaN or infinite at prefill.max_abs: tokens 0 to 1, the first at (0, 5)" in nan[PREFILL].detail
    cut = take(mistral, tmp_path / "cut", tokens, Variant(cut_vocabulary=3))
    assert "(1, 253), the original's (1, 256)" in cut[PREFILL].detail


def test_a_graph_that_takes_no_padding_is_measured_on_equal_rows(
    llama: Any, tokens: np.ndarray, tmp_path: Path
) -> None:
    found = take(llama, tmp_path, tokens, Variant(padding="none"))
    assert failures(found) == set()
    assert "the graph accepts no padding" in found[RAGGED].detail


@pytest.mark.parametrize("rows", [1, 2])
def test_no_more_rows_than_the_artifact_takes(
    mistral: Any, tokens: np.ndarray, tmp_path: Path, rows: int
) -> None:
    batches: set[int] = set()

    class Counted(OrtModel):
        def prefill(self, input_ids: np.ndarray, mask: np.ndarray | None = None, *, steps: int) -> np.ndarray:
            batches.add(len(input_ids))
            return super().prefill(input_ids, mask, steps=steps)

    for side in ("left", "none"):
        interface = write_decoder(mistral, tmp_path / side, Variant(padding=side))
        model = Counted(tmp_path / side, interface, threads=1, share_buffer=False)
        found = {m.metric: m for m in parity_of(model, TorchModel(mistral), tokens, rows=rows).measure()}
        assert failures(found) == set()
        if rows == 1:
            assert found[RAGGED].status is MeasurementStatus.NOT_APPLICABLE
            assert found[RAGGED].detail == "the artifact accepts one row at a time"
    windows = plan_windows(interface, tokens, ())
    measure_quality(model, TorchModel(mistral), windows, rows)
    assert max(batches) == rows


def test_a_window_that_interface_and_graph_forgot_is_measured(
    mistral: Any, tokens: np.ndarray, tmp_path: Path
) -> None:
    interface = write_decoder(mistral, tmp_path, Variant(ignore_window=True))
    slots = tuple(slot.model_copy(update={"window": None}) for slot in interface.cache)
    model = OrtModel(tmp_path, interface.model_copy(update={"cache": slots}), threads=1, share_buffer=False)
    (found,) = parity_of(model, TorchModel(mistral), tokens).window()
    assert found.status is MeasurementStatus.MEASURED
    assert found.value > 1e-2


def test_no_window_is_not_applicable(llama: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    found = take(llama, tmp_path, tokens, Variant())
    assert found[WINDOW].status is MeasurementStatus.NOT_APPLICABLE
    assert found[WINDOW].value is None
    assert failures(found) == set()


def test_a_model_too_short_for_a_level_is_not_measured_and_fails(
    llama: Any, tokens: np.ndarray, tmp_path: Path
) -> None:
    found = take(llama, tmp_path, tokens, replace(Variant(), max_length=8))
    assert found[PREFILL].figures.keys() <= {f"length_{n}" for n in range(1, 9)}
    assert found[Metric.POSITIONS].detail.startswith("8 of 8; logits compared at 8 of them")
    assert found[RAGGED].status is MeasurementStatus.NOT_MEASURED
    assert failures(found) == set()
    assert not evaluate(GATES[:4], list(found.values())).passed


def test_both_sides_of_every_switch(llama: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    model = OrtModel(tmp_path, write_decoder(llama, tmp_path), threads=1, share_buffer=False)
    parity = parity_of(model, TorchModel(llama), tokens, switches=(130,), lengths=(100,), budget=0.5)
    prefill = next(m for m in parity.measure() if m.metric is PREFILL)
    assert {"length_130", "length_131"} < prefill.figures.keys()
    assert parity.plan.first <= 130
    assert {99, 100, 129, 130} < set(parity.plan.steps)
    assert not any(at < 130 < at + size for at, size in parity.plan.turns)
    assert [q.pieces for q in parity.plan.passes()] == [(130, 30), (160,)]


def test_too_few_tokens(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path)
    with pytest.raises(ConfigError, match="given 1 tokens, too few for a prompt"):
        plan_of(interface, np.array([4]))
