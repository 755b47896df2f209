"""Mixed precision within a build: the budget holds, what is sensitive gets more, bad bounds are refused."""

from pathlib import Path

import pytest

from llmc.artifact.store.folder import open_artifact
from llmc.config import Allocation, BuildPlan, CalibrationText, Gate, Metric, Quantization
from llmc.errors import ConfigError
from llmc.pipeline import build, verify
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model
from tests.notes import Notes
from tests.quantize.reference import scheme

REASON = "a tiny random model in 4 and 8 bits"
TEXT = CalibrationText(window_tokens=64, max_windows=8)
CHOICES = (scheme(4, 64, False, "gptq"), scheme(8, 128, True, "mse"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)


def _plan(model: Path, output: Path, **bound: float) -> BuildPlan:
    plan = plan_build(str(model), target="cpu-mixed", profile="local", output=output, verify=False)
    assert plan.target.quantize is not None
    quantize = plan.target.quantize.model_copy(
        update={"allocation": Allocation(choices=CHOICES, text=TEXT, **bound), "calibration": TEXT}
    )
    gates = (
        Gate(metric=Metric.PREFILL_MAX_ABS, max=1e-3, reason=REASON),
        Gate(metric=Metric.WEIGHTS_SNR, min=10, reason=REASON),
        Gate(metric=Metric.TEXT_KL_MEAN, max=0.1, reason=REASON),
    )
    target = plan.target.model_copy(update={"quantize": quantize, "gates": gates})
    return plan.model_copy(update={"target": target})


def _bits(artifact: Path) -> tuple[float, set[int]]:
    weights = open_artifact(artifact).manifest.weights
    elements = sum(w.shape[0] * w.shape[1] for w in weights)
    return 8 * sum(w.bytes for w in weights) / elements, {w.bits for w in weights}


def test_bits_go_where_they_tell_most_within_the_budget(model: Path, tmp_path: Path) -> None:
    found = {}
    for budget in (5.5, 7.0):
        output, notes = tmp_path / f"{budget}", Notes()
        build(_plan(model, output, budget_bits=budget), notes)
        bits, kinds = _bits(output)
        assert kinds == {4, 8}
        assert budget - 0.6 < bits <= budget
        told = [n for n in notes.notes if n.startswith("allocate: ")][-1]
        assert told.startswith(f"allocate: {bits:.3f} bits per weight, predicted KL divergence ")
        found[budget] = float(told.split("divergence ")[1].split(";")[0])
    assert found[7.0] < found[5.5]
    assert verify(tmp_path / "5.5", str(model), (), SilentProgress(), own_gates=True).failure() is None


def test_a_bound_on_divergence_is_met_with_few_bytes(model: Path, tmp_path: Path) -> None:
    loose, tight = tmp_path / "loose", tmp_path / "tight"
    build(_plan(model, loose, max_kl=1.0), SilentProgress())
    build(_plan(model, tight, max_kl=6e-4), SilentProgress())
    assert _bits(loose)[1] == {4}
    assert _bits(loose)[0] < _bits(tight)[0]


def test_a_budget_that_cannot_be_met_is_refused_with_the_nearest(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no allocation stays within .* bytes; the nearest needs"):
        build(_plan(model, tmp_path / "out", budget_bits=4.0), SilentProgress())
    assert not (tmp_path / "out").exists()


def test_one_bound_is_given() -> None:
    with pytest.raises(ValueError, match="exactly one of budget_bits and max_kl"):
        Allocation(choices=CHOICES, text=TEXT)
    with pytest.raises(ValueError, match="exactly one of budget_bits and max_kl"):
        Allocation(choices=CHOICES, text=TEXT, budget_bits=5.0, max_kl=0.1)
    with pytest.raises(ValueError, match="if and only if a rule or choice has method gptq"):
        Quantization(
            accuracy_level=4, rules=(), allocation=Allocation(choices=CHOICES, text=TEXT, budget_bits=5.0)
        )
