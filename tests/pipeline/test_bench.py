"""`llmc bench` from the command line: the original and an earlier artifact, timed in turn."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from llmc.artifact.manifest import Manifest
from llmc.artifact.verdict import CheckStatus
from llmc.cli import main
from llmc.config import Gate, Metric
from llmc.gpu import Gpu
from llmc.pipeline import build
from llmc.pipeline.bench import _host_profile
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.report import read_report
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))


def _artifact(model: Path, folder: Path) -> Path:
    """An artifact that may be slow beside the original, and has to be far faster than an earlier one."""
    bounds = {Metric.INTER_TOKEN_RATIO: 1e3, Metric.PREVIOUS_RATIO: 1e-3}
    gates = tuple(Gate(metric=m, max=most, reason="no machine misses these") for m, most in bounds.items())
    plan = plan_build(str(model), target="cpu-fp32", profile="local", output=folder, verify=False)
    changes = {
        "target": plan.target.model_copy(update={"gates": gates}),
        "profile": plan.profile.model_copy(update={"threads": 1}),
    }
    return build(plan.model_copy(update=changes), SilentProgress()).path


def _bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--allow-own-gates", *arguments])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_beside_the_original_and_an_earlier_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    new, old = _artifact(model, tmp_path / "new"), _artifact(model, tmp_path / "old")
    out = tmp_path / "report"
    code, text, err = _bench(capsys, str(new), "--previous", str(old), "--report", str(out), "--json")
    assert code == 6
    assert "error: " in err
    assert "latency.previous_ratio" in err
    report = read_report(out / "report.json")
    assert json.loads(text) == json.loads(report.model_dump_json())
    found = {m.metric: m for m in report.measurements}
    previous = found[Metric.PREVIOUS_RATIO]
    assert 0 < previous.low <= previous.value <= previous.high
    assert "pairs of sessions, turns of 8 steps after 128 tokens" in previous.detail
    assert {c.metric: c.status for c in report.verdict.checks} == {
        Metric.INTER_TOKEN_RATIO: CheckStatus.PASS,
        Metric.PREVIOUS_RATIO: CheckStatus.FAIL,
    }
    assert [d.context for d in report.latency.decode] == [128]
    assert {f.name for f in out.iterdir()} == {"report.json", "report.md", "report.html", "junit.xml"}

    code, text, err = _bench(capsys, str(new), "--previous", str(tmp_path / "model"))
    assert (code, text) == (2, "")
    assert "model is not an artifact: it has no manifest.json" in err


def test_the_bandwidth_is_that_of_the_gpu_that_cuda_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_build("demo", target="cuda-fp16", profile="rtx-4090")
    manifest = cast(Manifest, SimpleNamespace(target=plan.target, profile=plan.profile, also=()))
    for name, bandwidth in (("NVIDIA GeForce RTX 4090", 1008), ("NVIDIA H200", 4800), ("NVIDIA L2", None)):
        found = (Gpu(name, "8.9", 24 << 30, "GPU-00000000-0000-0000-0000-000000000001"),)
        monkeypatch.setattr("llmc.machine.gpus", lambda found=found: found)
        assert _host_profile(manifest).bandwidth_gbs == bandwidth
