"""Three planted faults: in the files of an artifact, in a pass, and in what was traced."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc.passes
from llmc.artifact.store.folder import open_artifact
from llmc.artifact.verdict import CheckStatus, Measurement
from llmc.catalog import load_target
from llmc.checkpoint import open_checkpoint
from llmc.config import Metric
from llmc.errors import UnsupportedError
from llmc.pipeline import bisect, build, verify
from llmc.pipeline.result import GateReport
from llmc.pipeline.steps.stepwise import measure_passes
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.validate.reference import TorchModel
from tests.caches import own_cache
from tests.models import save_tiny_model

from .sabotage import Edit, WrongNorms, copy_artifact, other_attention_scale, reseal


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("bisect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", own_cache(root / "cache"))
        model = save_tiny_model("llama", root / "model", tokenizer=True, tie_word_embeddings=True)
        plan = plan_build(str(model), target="cpu-int4", profile="local", output=root / "out", verify=False)
        yield build(plan, SilentProgress()).path


def test_a_good_artifact_has_no_divergence(artifact: Path) -> None:
    found = bisect(artifact, None, SilentProgress())
    assert found.divergence is None
    assert found.right[0] == "trace"
    assert found.right[-1] == "artifact"
    assert "group-query-attention" in found.right
    assert found.failure() is None
    assert "no step changed the numbers" in found.render()


def test_a_fault_in_the_files(artifact: Path, tmp_path: Path) -> None:
    folder = copy_artifact(artifact, tmp_path / "broken")
    other_attention_scale(folder)
    reseal(folder)
    found = bisect(folder, None, SilentProgress()).divergence
    assert found is not None
    assert (found.step, found.layer, found.operator) == ("artifact", 1, "GroupQueryAttention")


def test_a_weight_changed_in_the_files(artifact: Path, tmp_path: Path) -> None:
    folder = copy_artifact(artifact, tmp_path / "broken")
    with Edit(folder) as edit:
        name = "model.layers.2.mlp.down_proj.weight.scales"
        edit.replace(name, edit.array(name) * np.float32(1.1))
    reseal(folder)
    found = bisect(folder, None, SilentProgress()).divergence
    assert found is not None
    assert (found.step, found.layer, found.operator) == ("artifact", 2, "MatMulNBits")
    assert found.relative == pytest.approx(0.1, rel=0.2)


def _passes(result: GateReport) -> Measurement:
    return next(m for m in result.report.measurements if m.metric is Metric.PASSES_MAX_ABS)


def test_a_fault_in_a_pass(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass for norms forgets the epsilon of layer 1."""
    known = {**llmc.passes.registered_passes(), "rms-norm": WrongNorms(1)}
    monkeypatch.setattr(llmc.passes, "registered_passes", lambda: known)
    (artifact.parent / "text").write_text("The river bends twice before the mill. " * 60, encoding="utf-8")
    text = (str(artifact.parent / "text"),)
    checked = _passes(verify(artifact, None, text, SilentProgress(), each_pass=True, every=True))
    assert checked.figures["rms-norm"] > 1e-2
    assert max(v for n, v in checked.figures.items() if n != "rms-norm") < 1e-4
    assert "the worst is rms-norm" in checked.detail
    result = bisect(artifact, None, SilentProgress())
    found = result.divergence
    assert found is not None
    assert (found.step, found.layer, found.operator) == ("rms-norm", 1, "SimplifiedLayerNormalization")
    assert result.right == ("trace", "linear")
    assert "WRONG  rms-norm: layer 1, operator SimplifiedLayerNormalization" in result.render()


def test_a_fault_in_the_trace(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's up projection of layer 1 gives something that the traced graph does not."""
    from llmc.checkpoint import Checkpoint

    load = Checkpoint.fill_reference

    def other(self: Checkpoint, *arguments: Any) -> Any:
        model: Any = load(self, *arguments)
        model.model.layers[1].mlp.up_proj.weight.data *= 1.05
        return model

    monkeypatch.setattr(Checkpoint, "fill_reference", other)
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))  # with no answers of the right original
    text = tmp_path / "text"
    text.write_text("The river bends twice before the mill. " * 60, encoding="utf-8")
    checked = _passes(verify(artifact, None, (str(text),), SilentProgress(), each_pass=True))
    assert checked.figures["trace"] > 1e-2
    assert max(v for name, v in checked.figures.items() if name != "trace") < 1e-4
    assert "the worst is trace" in checked.detail
    found = bisect(artifact, None, SilentProgress()).divergence
    assert found is not None
    assert (found.step, found.layer, found.operator) == ("trace", 1, "MatMul")
    assert found.module == "model.layers.1.mlp.up_proj"


def test_every_pass_of_a_good_target_keeps_the_numbers(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The river bends twice before the mill. " * 60, encoding="utf-8")
    result = verify(artifact, None, (str(tmp_path / "text"),), SilentProgress(), each_pass=True)
    made, figures = result.report, _passes(result).figures
    check = next(c for c in made.verdict.checks if c.metric is Metric.PASSES_MAX_ABS)
    prefill = next(c for c in made.verdict.checks if c.metric is Metric.PREFILL_MAX_ABS)
    assert (check.status, check.bound) == (CheckStatus.PASS, prefill.bound)
    assert len(figures) == 1 + len(open_artifact(artifact).manifest.target.passes)
    assert 0 < figures["trace"] < 1e-4


def test_targets_that_cannot_be_bisected(artifact: Path, tmp_path: Path) -> None:
    model = str(artifact.parent / "model")
    plan = plan_build(model, target="cuda-fp16", profile="rtx-4090", output=tmp_path / "half")
    half = build(plan, SilentProgress()).path
    with pytest.raises(
        UnsupportedError, match="cuda-fp16 computes in float16, whose rounding would be found"
    ):
        bisect(half, None, SilentProgress())
    checkpoint = open_checkpoint(model)
    original = TorchModel(checkpoint.fill_reference())
    with pytest.raises(UnsupportedError, match="the passes of tensorrt-fp16 cannot be compared"):
        measure_passes(checkpoint, load_target("tensorrt-fp16"), original, SilentProgress())
