"""Checkpoints that are quantized already: their codes reach the artifact, or a note says why not."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.arrays import Array
from llmc.artifact.manifest import State, WeightRecord
from llmc.checkpoint import open_checkpoint
from llmc.config import BuildPlan, Gate, Metric
from llmc.graph.weights import read_all
from llmc.pipeline import build, inspect
from llmc.pipeline.result import BuildResult
from llmc.pipeline.steps.rebuild import rebuild
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.quantize import encode
from llmc.quantize.methods import gptq
from llmc.validate.stored import read_stored
from tests.caches import own_cache
from tests.checkpoint.packed_formats import pack_mlx
from tests.checkpoint.quantized_folders import draw_codes, gptq_config, pack_gptq, write_codes, write_folder
from tests.checkpoint.test_quantized import LAYOUTS
from tests.checkpoint.test_quantized_formats import write_gpt_oss
from tests.models import EOS
from tests.notes import Notes

METRICS = (Metric.PREFILL_MAX_ABS, Metric.DECODE_MAX_ABS)
#: The layer has q, k and v in one matrix, gate and up in one, and two more.
MATRICES = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: the models differ in their weights alone, and are traced once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(cache))


def make_plan(
    model: Path, target: str = "cpu-int4", *, profile: str = "local", verify: bool = False
) -> BuildPlan:
    gates = tuple(Gate(metric=m, max=1e-3, reason="float32 in another order") for m in METRICS)
    output = model.with_name(target)
    plan = plan_build(str(model), target=target, profile=profile, output=output, verify=verify)
    changes: dict[str, object] = {"gates": gates}
    if plan.target.engine is not None:
        changes["engine"] = plan.target.engine.model_copy(update={"kv_capacity": 64})
    return plan.model_copy(update={"target": plan.target.model_copy(update=changes)})


def find_kept(result: BuildResult) -> list[WeightRecord]:
    return [w for w in result.manifest.weights if w.origin == "kept"]


def check_kept(result: BuildResult, plan: BuildPlan, values: Mapping[str, Array], count: int) -> None:
    """Matrices that are said to be kept hold `values`, and there are `count` of them."""
    sources = rebuild(open_checkpoint(plan.model), plan.target, (), result.path, SilentProgress()).sources
    kept = {w.name: sources[w.name] for w in find_kept(result)}
    assert len(kept) == count
    for name, tensor in read_stored(result.path, kept).items():
        wanted = np.concatenate([values[source] for source in sources[name].sources])
        np.testing.assert_array_equal(tensor.whole(), wanted)
        np.testing.assert_array_equal(read_all(sources[name]).astype(np.float32), wanted)


@pytest.mark.parametrize(
    ("layout", "bits", "blocks", "symmetric"),
    [("gptq", 4, {32}, False), ("awq", 4, {32}, False), ("compressed-int8", 8, {32, 64}, True)],
)
def test_codes_are_kept_with_fused_projections(
    layout: str,
    bits: int,
    blocks: set[int],
    symmetric: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched: set[str] = set()
    finish = encode.Encoder.finish

    def watch(self: encode.Encoder) -> Any:
        searched.add(self.name)
        return finish(self)

    monkeypatch.setattr(encode.Encoder, "finish", watch)
    config, pack, drawn = LAYOUTS[layout]
    values = write_codes(tmp_path / "model", config, pack, **drawn)
    plan = make_plan(tmp_path / "model", verify=layout == "gptq")
    progress = Notes()
    result = build(plan, progress)
    assert result.failure() is None
    assert (result.manifest.state is State.VERIFIED) == plan.verify
    check_kept(result, plan, values, MATRICES)
    assert searched == {"lm_head.weight", "model.embed_tokens.weight"}
    kept = find_kept(result)
    assert ({w.bits for w in kept}, {w.symmetric for w in kept}) == ({bits}, {symmetric})
    assert {w.block_size for w in kept} == blocks
    text = inspect(str(result.path)).render()
    assert "model.layers.0.self_attn.o_proj.weight; codes of the checkpoint: kept" in text
    assert [n for n in progress.notes if "codes of the checkpoint: kept for 4 matrices" in n]


def test_groups_that_are_scattered_are_quantized_again_with_a_note(tmp_path: Path) -> None:
    config, pack, drawn = LAYOUTS["gptq-desc-act"]
    write_codes(tmp_path / "model", config, pack, **drawn)
    progress = Notes()
    result = build(make_plan(tmp_path / "model"), progress)
    assert result.failure() is None
    reason = "quantized again (its groups are scattered along the inputs (desc_act or actorder))"
    assert sum(w.origin == reason for w in result.manifest.weights) == MATRICES
    assert [n for n in progress.notes if f"codes of the checkpoint: {reason} for 4 matrices" in n]


def test_a_projection_in_float_stays_apart_from_its_quantized_neighbours(tmp_path: Path) -> None:
    def pack(module: str, shape: tuple[int, int]) -> tuple[Mapping[str, Array], Array]:
        codes = draw_codes(len(module), shape, bits=3 if module.endswith("up_proj") else 4)
        if module.endswith("v_proj"):
            return {"weight": codes.values()}, codes.values()
        return pack_gptq()(codes), codes.values()

    values = write_folder(tmp_path / "model", gptq_config(), pack)
    plan = make_plan(tmp_path / "model")
    result = build(plan, SilentProgress())
    check_kept(result, plan, values, MATRICES + 1)  # q and k of their own
    (v_proj,) = [w for w in result.manifest.weights if w.name.endswith("v_proj.weight")]
    assert v_proj.origin is None


@pytest.mark.parametrize(
    ("target", "profile", "origin"),
    [
        ("cpu-fp32", "local", "made floats"),
        ("cuda-int4", "l4", "kept"),
        ("tensorrt-int4", "h100-sxm", "quantized again (its types have grids of their own)"),
    ],
)
def test_other_targets(target: str, profile: str, origin: str, tmp_path: Path) -> None:
    config, pack, drawn = LAYOUTS["gptq"]
    write_codes(tmp_path / "model", config, pack, **drawn)
    result = build(make_plan(tmp_path / "model", target, profile=profile), SilentProgress())
    assert {w.origin for w in result.manifest.weights if "layers" in w.name} == {origin}


def check_experts(result: BuildResult, plan: BuildPlan, bits: int) -> None:
    """The two stacks of the artifact have the checkpoint's codes: they read as its values do."""
    sources = rebuild(open_checkpoint(plan.model), plan.target, (), result.path, SilentProgress()).sources
    kept = {w.name: sources[w.name] for w in find_kept(result) if "experts" in w.name}
    assert [w.bits for w in find_kept(result) if w.name in kept] == [bits] * 2
    for name, tensor in read_stored(result.path, kept).items():
        np.testing.assert_array_equal(tensor.whole(), read_all(kept[name]).astype(np.float32))


def test_codes_of_mlx_are_kept_with_their_biases(tmp_path: Path) -> None:
    pack = partial(pack_mlx, bits=4)
    values = write_folder(tmp_path / "model", {"group_size": 32, "bits": 4}, lambda _, shape: pack(shape))
    plan = make_plan(tmp_path / "model")
    result = build(plan, SilentProgress())
    sources = rebuild(open_checkpoint(plan.model), plan.target, (), result.path, SilentProgress()).sources
    kept = {w.name: sources[w.name] for w in find_kept(result)}
    assert len(kept) == MATRICES
    for name, tensor in read_stored(result.path, kept).items():
        wanted = np.concatenate([values[source] for source in sources[name].sources])
        np.testing.assert_allclose(tensor.whole(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("layout", "bits"), [("gptq", 4), ("compressed-int8", 8)])
def test_codes_of_experts_are_kept(layout: str, bits: int, tmp_path: Path) -> None:
    config, pack, drawn = LAYOUTS[layout]
    values = write_codes(tmp_path / "model", config, pack, "qwen3_moe", **drawn)
    name = "model.layers.0.mlp.experts.down_proj"
    stacked = np.stack([values[f"model.layers.0.mlp.experts.{i}.down_proj.weight"] for i in range(4)])
    np.testing.assert_array_equal(open_checkpoint(str(tmp_path / "model")).tensors.read(name), stacked)
    plan = make_plan(tmp_path / "model")
    result = build(plan, SilentProgress())
    check_experts(result, plan, bits)


@pytest.mark.parametrize("target", ["cpu-int4", "cpu-int8"])
def test_experts_of_gpt_oss_are_kept_without_loss(target: str, tmp_path: Path) -> None:
    write_gpt_oss(tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    plan = make_plan(tmp_path / "model", target, verify=target == "cpu-int8")
    result = build(plan, SilentProgress())
    assert result.failure() is None
    check_experts(result, plan, 8)


def test_experts_in_scattered_groups_are_quantized_again(tmp_path: Path) -> None:
    config, pack, drawn = LAYOUTS["gptq-desc-act"]
    write_codes(tmp_path / "model", config, pack, "qwen3_moe", **drawn)
    result = build(make_plan(tmp_path / "model"), SilentProgress())
    origins = {w.origin for w in result.manifest.weights if "experts" in w.name}
    assert origins == {"quantized again (its groups are scattered along the inputs (desc_act or actorder))"}


def test_calibration_leaves_kept_codes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated: list[str] = []
    quantize = gptq.quantize_gptq

    def watch(*args: Any) -> Any:
        calibrated.append(args[-1])
        return quantize(*args)

    monkeypatch.setattr(gptq, "quantize_gptq", watch)
    config, pack, drawn = LAYOUTS["gptq"]
    values = write_codes(tmp_path / "model", config, pack, **drawn)
    plan = make_plan(tmp_path / "model", "cpu-int4-gptq")
    check_kept(build(plan, SilentProgress()), plan, values, MATRICES)
    assert calibrated == ["lm_head.weight"]


def test_an_allocation_decides_on_the_others(tmp_path: Path) -> None:
    config, pack, drawn = LAYOUTS["gptq"]
    values = write_codes(tmp_path / "model", config, pack, **drawn)
    plan = make_plan(tmp_path / "model", "cpu-mixed")
    progress = Notes()
    check_kept(build(plan, progress), plan, values, MATRICES)
    (note,) = [n for n in progress.notes if n.startswith("allocate: ") and "bits per weight" in n]
    assert "; 1 matrices of " in note
