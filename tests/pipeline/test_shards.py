"""Builds write the files of ranks, and refuse what cannot be split before any work."""

from pathlib import Path

import pytest

from llmc.artifact.ranks import LAYOUT, RANKS, rank_file, read_layout
from llmc.artifact.store.folder import open_artifact
from llmc.artifact.store.integrity import find_damage
from llmc.checkpoint.ranks import find_differences
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.config import BuildPlan, Family, WeightRule
from llmc.errors import ConfigError, ResourceError
from llmc.pipeline import build
from llmc.pipeline.gate.ranks import rank_extras
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.caches import own_cache
from tests.models import save_tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path_factory.getbasetemp() / "shards-cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"), tokenizer=True)


def plan(model: Path, output: Path, block_size: int, shards: int, **more: str) -> BuildPlan:
    """A build of vllm-w4a16 by rounding to nearest in blocks of another size."""
    planned = plan_build(
        str(model), target="vllm-w4a16", profile="cpu-avx2", output=output, verify=False, shards=shards
    )
    assert planned.target.quantize is not None
    scheme = {"bits": 4, "block_size": block_size, "symmetric": True, "method": "rtn"}
    rules = (
        WeightRule(role="embedding", scheme=None),
        WeightRule(role="lm_head", scheme=None),
        WeightRule.model_validate({"scheme": scheme}),
    )
    changes = {"rules": rules, "calibration": None, "scale_channels": False}
    section = planned.target.quantize.model_copy(update=changes)
    target = planned.target.model_copy(update={"quantize": section})
    return planned.model_copy(update={"target": target, "shards_for": "transformers", **more})


def test_a_build_writes_a_file_for_each_rank(llama: Path, tmp_path: Path) -> None:
    build(plan(llama, tmp_path / "out", 16, 2), SilentProgress())
    artifact = open_artifact(tmp_path / "out")
    assert {LAYOUT, rank_file(0), rank_file(1)} < artifact.manifest.files.keys()
    assert find_damage(artifact).all == ()
    layout = read_layout(artifact.path)
    assert layout is not None
    module = "model.layers.0.mlp.down_proj"
    assert layout.tensors[f"{module}.weight_packed"].shape == (64, 12)
    assert layout.ranks[1][f"{module}.weight_packed"].shape == (64, 6)
    assert layout.ranks[1][f"{module}.weight_scale"].shape == (64, 3)
    assert list(find_differences(artifact.path, SafetensorsStore.open(artifact.path))) == []


def test_a_lost_layout_does_not_skip_the_ranks(tmp_path: Path) -> None:
    assert rank_extras(tmp_path) == []
    (tmp_path / RANKS).mkdir()
    assert [extra.metrics for extra in rank_extras(tmp_path)] == [Family.RANKS.metrics]


def test_groups_that_do_not_divide_are_refused_before_any_work(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 groups of 32 inputs cannot be split over 2 ranks"):
        build(plan(llama, tmp_path / "out", 32, 2), SilentProgress())
    assert not any(tmp_path.iterdir())


def test_names_of_vllm_need_vllm(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_VLLM_ENVIRONMENT", str(tmp_path / "none"))
    with pytest.raises(ResourceError, match="vllm is not installed") as refused:
        build(plan(llama, tmp_path / "out", 16, 2, shards_for="vllm"), SilentProgress())
    assert refused.value.hint == "llmc servers install vllm"


def test_graphs_are_not_split(llama: Path) -> None:
    with pytest.raises(ConfigError, match="target cpu-int4 writes a graph"):
        plan_build(str(llama), target="cpu-int4", profile="cpu-avx2", shards=2)


def test_names_of_ranks_need_their_number(llama: Path) -> None:
    with pytest.raises(ConfigError, match="--shards-for vllm names tensors of ranks, and no ranks"):
        plan_build(str(llama), target="vllm-w4a16", profile="cpu-avx2", shards_for="vllm")
