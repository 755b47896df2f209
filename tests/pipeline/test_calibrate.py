"""Calibration within a build: quantized activations of engines, and what float16 cannot hold."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llmc.artifact.store.folder import open_artifact
from llmc.checkpoint import open_checkpoint
from llmc.config import (
    BuildPlan,
    CalibrationText,
    Dtype,
    EngineRule,
    EngineScheme,
    Gate,
    Metric,
    Span,
    WeightFormat,
)
from llmc.errors import UnsupportedError
from llmc.pipeline import build, verify
from llmc.pipeline.steps.calibrate import cut_text, look_for_overflow, prepare
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.quantize.activations import SMOOTHING
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model
from tests.notes import Notes

REASON = "a tiny random model in eight bits"
GATES = (
    Gate(metric=Metric.WEIGHTS_EXACT, max=0, reason=REASON),
    Gate(metric=Metric.WEIGHTS_SNR, min=35, reason=REASON),
    Gate(metric=Metric.WEIGHTS_BLOCK_SNR, min=15, reason=REASON),
    Gate(metric=Metric.TEXT_KL_MEAN, max=0.05, reason=REASON),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))


def _plan(model: Path, output: Path, least_db: float) -> BuildPlan:
    """W8A8 for a GPU that waits for its engine: what is looked at here comes before it."""
    plan = plan_build(str(model), target="tensorrt-w8a8", profile="h100-sxm", output=output)
    assert plan.target.engine is not None
    engine = plan.target.engine.model_copy(
        update={
            "kv_capacity": 128,
            "prefill": Span(least=1, typical=16, most=64),
            "calibration": CalibrationText(window_tokens=64, max_windows=8),
            "least_activation_db": least_db,
        }
    )
    return plan.model_copy(
        update={"target": plan.target.model_copy(update={"engine": engine, "gates": GATES})}
    )


def _spoil(folder: Path, name: str, factor: float) -> None:
    data = load_file(folder / "model.safetensors")
    data[name] = data[name] * factor
    save_file(data, folder / "model.safetensors", {"format": "pt"})


def test_activations_are_smoothed_and_quantized_and_verify_knows_it(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    data = load_file(model / "model.safetensors")
    data["model.layers.1.input_layernorm.weight"][5] *= 50
    save_file(data, model / "model.safetensors", {"format": "pt"})
    result = build(_plan(model, tmp_path / "out", 12), SilentProgress())
    assert result.failure() is None, result.render()
    facts = json.loads((tmp_path / "out/reports/activations.json").read_text())
    assert facts["float"] == {}
    assert len(facts["snr_db"]) == 4 * 3 + 1
    assert "model.layers.1.self_attn.q_proj.weight" in facts["smoothed"]
    assert facts["peaks"]["model.layers.1.input_layernorm"] > 50
    assert SMOOTHING in open_artifact(tmp_path / "out").manifest.files
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir() if file.is_file()}) == 1
    again = verify(tmp_path / "out", None, (), SilentProgress(), own_gates=True)
    assert again.failure() is None
    kept = load_file(tmp_path / "out" / SMOOTHING)
    kept["model.layers.1.self_attn.q_proj.weight"][3] *= 2
    save_file(kept, tmp_path / "out" / SMOOTHING)
    spoilt = verify(tmp_path / "out", None, (), SilentProgress(), own_gates=True, every=True)
    assert "weights.mismatches" in str(spoilt.failure())


def test_activations_that_do_not_bear_it_are_told(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    notes = Notes()
    plan = _plan(model, tmp_path / "out", 100)
    build(plan.model_copy(update={"verify": False}), notes)
    told = [n for n in notes.notes if "stays in float16" in n]
    assert len(told) == 4 * 3 + 1
    assert all("less than 100" in n for n in told)


def test_float16_that_overflows_is_refused_with_the_modules(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    _spoil(model, "model.layers.1.mlp.down_proj.weight", 3e6)
    with pytest.raises(
        UnsupportedError, match=r"float16 ends at 65,504, .* return larger values: model\.layers\.\d.* \("
    ) as caught:
        look_for_overflow(open_checkpoint(str(model)), Dtype.FLOAT16, SilentProgress())
    assert "model.layers.1.mlp.down_proj (" in str(caught.value)
    assert caught.value.hint is not None
    assert "tensorrt-bf16" in caught.value.hint
    assert look_for_overflow(open_checkpoint(str(model)), Dtype.BFLOAT16, SilentProgress()).peaks == {}


def test_the_largest_value_is_told(tmp_path: Path) -> None:
    model = save_tiny_model("qwen3", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    notes = Notes()
    found = look_for_overflow(open_checkpoint(str(model)), Dtype.FLOAT16, notes)
    assert notes.notes[-1].startswith("overflow: the largest value on the calibration text is ")
    assert {"model.embed_tokens", "model.layers.2.self_attn.k_norm", "lm_head"} <= found.peaks.keys()


def test_windows_fit_the_model() -> None:
    text = CalibrationText(window_tokens=64, max_windows=4)
    assert cut_text(list(range(500)), (1,), text, None).shape == (4, 64)
    assert cut_text(list(range(500)), (1,), text, 48).shape == (4, 48)
    assert cut_text(list(range(20)), (1,), text, None).shape == (1, 21)


def test_windows_fit_a_model_that_states_its_positions_by_another_name(tmp_path: Path) -> None:
    """MPT has max_seq_len, beyond which its own code fails."""
    model = save_tiny_model("mpt", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    text = CalibrationText(window_tokens=512, max_windows=1)
    assert prepare(open_checkpoint(str(model)), text, "test", {}).windows.shape == (1, 256)


def test_calibration_goes_with_quantized_activations() -> None:
    from llmc.config import Engine

    static = EngineRule(scheme=EngineScheme(format=WeightFormat.FP8, activations="static"))
    span = Span(least=1, typical=1, most=2)
    with pytest.raises(ValueError, match="give calibration if and only if a rule quantizes activations"):
        Engine(kv_capacity=64, batch=span, prefill=span, weights=(static,))
