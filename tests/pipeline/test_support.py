"""`llmc inspect --support`: what each target makes of a model, before any work."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.cli import main
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))


def _call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *arguments])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_what_targets_make_of_each_kind_of_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(
        "gemma2", tmp_path / "model", tokenizer=True, eos_token_id=EOS, max_position_embeddings=2048
    )

    original = SafetensorsStore.read

    def read(store: SafetensorsStore, name: str, *rows: Any) -> Any:
        assert len(store.infos()[name].shape) == 1, f"{name} is read"
        return original(store, name, *rows)

    monkeypatch.setattr(SafetensorsStore, "read", read)
    names = "cpu-fp32,cpu-int4-compiled,cpu-mixed,tensorrt-fp16,cuda-fp16"
    code, out, err = _call(capsys, str(model), "--support", "--target", names, "--json")
    assert code == 0, err
    found = json.loads(out)
    kinds = {kind["name"]: kind["layers"] for kind in found["captured"]}
    assert kinds == {"cached attention, window 8": [0, 2], "cached attention": [1]}
    assert (found["layers"], found["uncaptured"]) == (3, [])
    plain, compiled, mixed, tensorrt, cuda = found["targets"]
    assert [each["refused"] for each in found["targets"]] == [None] * 5
    operators = {kind["name"]: kind["layers"] for kind in plain["operators"]}
    assert operators["GroupQueryAttention, window 8"] == [0, 2]
    assert operators["GroupQueryAttention"] == [1]
    assert operators.keys().isdisjoint({"Shape", "Slice", "Cast", "Where", "ArgMax", "Range"})
    on_cuda = {kind["name"] for kind in cuda["operators"]}
    assert "FusedMatMul" in on_cuda
    assert on_cuda.isdisjoint({"And", "Equal", "Greater", "MatMul"})
    assert cuda["notes"] == []
    assert "compiled region" in {kind["name"] for kind in compiled["operators"]}
    assert any(note.startswith("not compiled, there is no kernel for it: ") for note in compiled["notes"])
    assert "a build measures the model" in " ".join(mixed["notes"])
    assert "RMSNormalization" in {kind["name"] for kind in tensorrt["operators"]}
    declined = {d["code"]: d["layers"] for record in tensorrt["passes"] for d in record["declined"]}
    assert declined["softcap"] == [0, 1, 2]


def test_the_exit_code_says_that_no_target_takes_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(save_tiny_model("bloom", tmp_path / "model", tokenizer=True, eos_token_id=EOS))
    code, out, err = _call(capsys, model, "--support", "--target", "tensorrt-fp16")
    assert code == 3
    assert "layers 0-2: in plain operators" in out
    assert "tensorrt-fp16: refused\n" in out
    assert "BloomForCausalLM cannot be built for tensorrt-fp16" in err
    code, out, err = _call(capsys, model, "--support", "--target", "tensorrt-fp16,cpu-fp32")
    assert (code, err.count("error:")) == (0, 0)
    assert "\ncpu-fp32: can be built\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--support", "--target", "cpu-fp23"), "no target is named cpu-fp23"),
        (("--target", "cpu-fp32"), "belong to --support"),
        (("--support", "--explain", "skip-norm"), "cannot be combined"),
    ],
)
def test_wrong_options(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _call(capsys, str(tmp_path), *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_bits_that_are_not_chosen_do_not_leave_states_to_plain_operators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(save_tiny_model("mamba2", tmp_path / "model", tokenizer=True, eos_token_id=EOS))
    code, out, _ = _call(
        capsys, model, "--support", "--target", "cpu-mixed-compiled,cpu-int8-compiled", "--json"
    )
    mixed, compiled = json.loads(out)["targets"]
    assert (code, mixed["plain"], compiled["plain"]) == (0, [], [])
    assert "compiled region" in {kind["name"] for kind in compiled["operators"]}
