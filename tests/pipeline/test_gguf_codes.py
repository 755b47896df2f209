"""GGUF files: their codes reach the artifact, exactly or with a loss that is told."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from llmc.artifact.manifest import State
from llmc.checkpoint import open_checkpoint
from llmc.graph.weights import read_all
from llmc.pipeline import build
from llmc.pipeline.result import BuildResult
from llmc.pipeline.steps.rebuild import rebuild
from llmc.progress import SilentProgress
from llmc.validate.stored import read_stored
from tests.caches import own_cache
from tests.checkpoint.tiny_gguf import write_gguf
from tests.notes import Notes
from tests.pipeline.test_stored_codes import make_plan

#: Two layers of four matrices, embedding and head in one.
MATRICES = 9


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: the models differ in their weights alone, and are traced once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(cache))


def worst_error(result: BuildResult, file: Path, target: str) -> float:
    """The largest error of a weight, relative to the largest weight of its matrix."""
    plan = make_plan(file, target)
    sources = rebuild(open_checkpoint(str(file)), plan.target, (), result.path, SilentProgress()).sources
    matrices = {w.name: sources[w.name] for w in result.manifest.weights}
    errors = []
    for name, tensor in read_stored(result.path, matrices).items():
        values = read_all(sources[name]).astype(np.float32)
        errors.append(float(np.abs(tensor.whole() - values).max() / np.abs(values).max()))
    return max(errors)


def origins(result: BuildResult) -> set[str | None]:
    return {w.origin for w in result.manifest.weights}


@pytest.mark.parametrize(("kind", "verify"), [(Kind.Q4_1, True), (Kind.Q4_0, False), (Kind.Q5_1, False)])
def test_codes_and_scales_are_kept_bit_for_bit(kind: Kind, verify: bool, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", kind=kind, kinds={"token_embd.weight": Kind.Q8_0})
    progress = Notes()
    result = build(make_plan(file, verify=verify), progress)
    assert result.failure() is None
    assert (result.manifest.state is State.VERIFIED) == verify
    assert origins(result) == {"kept"}
    assert [n for n in progress.notes if f"codes of the checkpoint: kept for {MATRICES} matrices" in n]
    assert worst_error(result, file, "cpu-int4") == 0


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q3_K, Kind.IQ4_XS])
def test_scales_of_more_digits_are_rounded_and_the_loss_is_told(kind: Kind, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", kind=kind, kinds={"attn_v.weight": Kind.Q6_K}, scale=8)
    progress = Notes()
    result = build(make_plan(file), progress)
    assert origins(result) == {"kept, scales rounded to float16"}
    declined = next(p.declined for p in result.manifest.passes if p.name == "pack-qkv")
    assert [d.code for d in declined] == ["codes"]
    (note,) = [n for n in progress.notes if n.startswith("write: codes of the checkpoint: kept, scales")]
    loss = float(note.partition("matrices, ")[2].partition(" dB below")[0])
    assert 55 < loss < 90
    assert worst_error(result, file, "cpu-int4") < 2e-3


def test_what_has_no_codes_is_quantized_again_and_the_loss_is_told(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", kind=Kind.Q8_0, kinds={"ffn_down.weight": Kind.IQ2_XXS}, scale=8)
    progress = Notes()
    result = build(make_plan(file), progress)
    reason = "quantized again (IQ2_XXS has codes that are not evenly spaced)"
    assert origins(result) == {"kept", reason}
    (note,) = [n for n in progress.notes if n.startswith(f"write: codes of the checkpoint: {reason}: 2 mat")]
    assert 10 < float(note.partition("matrices, ")[2].partition(" dB below")[0]) < 30


def test_targets_that_calibrate_leave_the_codes_alone(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", kind=Kind.Q4_1)
    progress = Notes()
    result = build(make_plan(file, "cpu-mixed"), progress)
    assert origins(result) == {"kept"}
    assert "allocate: nothing to decide, all matrices keep the checkpoint's codes" in progress.notes
    assert not [n for n in progress.notes if n.startswith("calibrate")]
    assert worst_error(result, file, "cpu-mixed") == 0


@pytest.mark.parametrize(("target", "error"), [("cpu-fp32", 0.0), ("cuda-int4", 1e-7)])
def test_other_targets(target: str, error: float, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", "gpt2", kind=Kind.Q4_1)
    plan = make_plan(file, target, profile="l4" if target == "cuda-int4" else "local")
    result = build(plan, SilentProgress())
    assert origins(result) == {"made floats" if target == "cpu-fp32" else "kept"}
    sources = rebuild(open_checkpoint(str(file)), plan.target, (), result.path, SilentProgress()).sources
    matrices = {w.name: sources[w.name] for w in result.manifest.weights}
    for name, tensor in read_stored(result.path, matrices).items():
        np.testing.assert_allclose(tensor.whole(), read_all(sources[name]), rtol=1e-3 if error else 0)


def test_compiled_kernels_hold_the_codes(tmp_path: Path) -> None:
    kinds = {"token_embd.weight": Kind.Q8_0, "attn_v.weight": Kind.Q5_1, "ffn_down.weight": Kind.Q5_0}
    file = write_gguf(tmp_path / "m.gguf", kind=Kind.Q4_1, kinds=kinds)
    result = build(make_plan(file, "cpu-int4-compiled"), SilentProgress())
    assert origins(result) == {"kept"}
    assert result.manifest.kernels is not None
    assert not [left for left in result.manifest.kernels.outside if left.operator == "MatMulNBits"]
    assert worst_error(result, file, "cpu-int4-compiled") == 0
