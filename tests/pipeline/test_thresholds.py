"""An artifact is held to the gates that ship or that the user names, whatever its manifest says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmc.artifact.manifest import MANIFEST, Manifest
from llmc.artifact.store.folder import open_artifact
from llmc.artifact.verdict import CheckStatus
from llmc.catalog import load_target, shipped_folder
from llmc.config import Metric
from llmc.errors import ConfigError, ParityError
from llmc.pipeline import bench, build, verify
from llmc.pipeline.gate.thresholds import choose_thresholds
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.models import save_tiny_model

from .sabotage import copy_artifact


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("thresholds")
    model = save_tiny_model("llama", root / "model", tokenizer=True)
    plan = plan_build(str(model), target="cpu-fp32", profile="local", output=root / "out", verify=False)
    return build(plan, SilentProgress()).path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Manifest:
    """The manifest after a change of its target."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest["target"])
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return open_artifact(folder).manifest


def loosen(target: dict[str, Any]) -> None:
    for gate in target["gates"]:
        gate["max"] = None if gate["max"] is None else 1e9


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (loosen, "the artifact's gate for prefill.max_abs is at most 1000000000.0, cpu-fp32's is at most "),
        (
            lambda t: t["gates"].remove(next(g for g in t["gates"] if g["metric"] == "text.kl_mean")),
            "the artifact has no gate for text.kl_mean, cpu-fp32's is at most ",
        ),
        (
            lambda t: t["gates"].append(
                {"metric": "task.accuracy_change", "min": -1, "reason": "anything goes"}
            ),
            "the artifact's gate for task.accuracy_change is at least -1.0, cpu-fp32 has none",
        ),
        (
            lambda t: t.update(name="mine"),
            "there is no target mine whose gates could apply",
        ),
    ],
)
def test_gates_of_the_artifacts_own_are_a_mismatch(
    change: Callable[[dict[str, Any]], object], told: str, good: Path, tmp_path: Path
) -> None:
    folder = copy_artifact(good, tmp_path / "artifact")
    manifest = edit(folder, change)
    result = verify(folder, None, (), SilentProgress())
    (failed,) = (c for c in result.report.verdict.checks if c.status is CheckStatus.FAIL)
    assert failed.metric is Metric.GATES
    assert told in failed.detail
    assert "--allow-own-gates" in str(getattr(result.failure(), "hint", None))
    allowed = choose_thresholds(manifest, None, None, own=True)
    assert not allowed.missed
    assert allowed.target.gates == manifest.target.gates


def test_the_gates_that_are_held(good: Path, tmp_path: Path) -> None:
    """Those that ship; those of a file, whose name the artifact bears; those of another target, as asked."""
    folder = copy_artifact(good, tmp_path / "artifact")
    loose, shipped = edit(folder, loosen), load_target("cpu-fp32")
    held = choose_thresholds(loose, None, None, own=False)
    assert held.target.gates[1:] == shipped.gates
    manifest = edit(folder, lambda target: target.update(name="mine", lookup=None))
    document = yaml.safe_load((shipped_folder() / "targets/cpu-fp32.yaml").read_text(encoding="utf-8"))
    file = tmp_path / "targets" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(document | {"name": "mine"}), encoding="utf-8")
    for named, path in ((str(file), None), (None, tmp_path)):
        held = choose_thresholds(manifest, named, path, own=False)
        assert held.missed
        assert held.target.gates[1:] == shipped.gates
    assert choose_thresholds(manifest, str(file), None, own=True).target.gates == shipped.gates
    other = choose_thresholds(manifest, "cpu-int4", None, own=False)
    assert not other.missed
    assert other.target.gates[1:] == load_target("cpu-int4").gates
    assert other.compared.detail == "those of cpu-int4, as requested; the artifact was built for mine"
    with pytest.raises(ConfigError, match="no target is named cpu-int3"):
        choose_thresholds(manifest, "cpu-int3", None, own=False)


def test_files_are_held_whatever_the_gates(good: Path, tmp_path: Path) -> None:
    folder = copy_artifact(good, tmp_path / "artifact")
    edit(folder, lambda target: target.update(gates=[]))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    verdict = verify(folder, None, (), SilentProgress(), own_gates=True).report.verdict
    assert [(c.metric, c.status) for c in verdict.checks] == [(Metric.FILES, CheckStatus.FAIL)]


def test_what_was_built_otherwise_is_told(good: Path, tmp_path: Path) -> None:
    folder = copy_artifact(good, tmp_path / "artifact")
    manifest = edit(folder, lambda target: (target["passes"].pop(), target.update(logits="all")))
    found = choose_thresholds(manifest, None, None, own=False)
    assert not found.missed
    assert found.compared.detail == "those of cpu-fp32; the artifact was built with another logits and passes"


def test_bench_holds_the_gates_on_time_that_ship(good: Path, tmp_path: Path) -> None:
    folder = copy_artifact(good, tmp_path / "artifact")
    edit(folder, loosen)
    with pytest.raises(
        ParityError, match=r"gate for latency\.inter_token_ratio is at most 1000000000"
    ) as caught:
        bench(folder, None, SilentProgress())
    assert "--allow-own-gates" in str(caught.value.hint)
