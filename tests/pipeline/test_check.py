"""`llmc check` from a checkpoint on: GPUs, the model as a whole, and nodes."""

import json
from pathlib import Path

import pytest

from llmc.cli import main
from llmc.errors import UnsupportedError
from llmc.pipeline import check
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(
        save_tiny_model(
            "gemma2", tmp_path / "model", tokenizer=True, eos_token_id=EOS, max_position_embeddings=2048
        )
    )


def _call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["check", *arguments])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_nothing_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _call(capsys, model, "--target", "tensorrt-fp16", "--profile", "l4,h100-sxm", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["obstacles"], found["refused"], found["unknown"]) == ([], [], [])
    assert found["profiles"] == ["l4", "h100-sxm"]
    assert found["asked"].startswith("tensorrt_rtx 1.")
    assert found["nodes"] > found["signatures"] > 10
    declined = {d["code"] for record in found["passes"] for d in record["declined"]}
    assert "softcap" in declined


def test_experts_are_said_to_be_computed_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = str(
        save_tiny_model(
            "mixtral", tmp_path / "mixture", tokenizer=True, eos_token_id=EOS, max_position_embeddings=2048
        )
    )
    code, out, err = _call(capsys, mixture, "--target", "tensorrt-fp16", "--profile", "l4")
    assert code == 0, err
    assert (
        "in plain operators: Experts, layers 0-2: all experts are computed, not the chosen ones alone" in out
    )


def test_every_gpu_that_refuses_the_precision(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _call(capsys, model, "--target", "tensorrt-int4", "--profile", "t4,l4")
    assert code == 3
    assert "t4: target tensorrt-int4 needs int8, which NVIDIA T4" in out
    assert "0 refused by tensorrt_rtx" in out  # the nodes are asked all the same
    assert "error: tensorrt-int4 cannot be built: t4" in err


def test_a_model_that_does_not_lower(model: str) -> None:
    plan = plan_build(model, target="tensorrt-fp16", profile="l4")
    assert plan.target.engine is not None
    engine = plan.target.engine.model_copy(update={"kv_capacity": 4096})
    plan = plan.model_copy(update={"target": plan.target.model_copy(update={"engine": engine})})
    result = check(plan, SilentProgress())
    assert [each.where for each in result.obstacles] == ["model"]
    assert "kv_capacity is 4096, but the model has 2048 positions" in result.render()
    assert isinstance(result.failure(), UnsupportedError)
    assert result.asked is None


def test_targets_of_other_backends_have_nothing_to_ask(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _call(capsys, model, "--target", "cuda-fp16", "--profile", "l4")
    assert (code, out) == (2, "")
    assert "llmc check asks TensorRT, but target cuda-fp16 is of backend onnxruntime" in err
