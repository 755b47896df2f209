"""The target of a build that names none."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmc.catalog import list_targets
from llmc.cli import main
from llmc.config import BuildPlan
from llmc.defaults import choose_target
from llmc.errors import ConfigError, KernelError
from tests.models import EOS, save_tiny_model


def test_kernels_are_compiled_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose_target("cpu-avx2")
    assert choice.target == "cpu-mixed-compiled"
    assert choice.reason == "target cpu-mixed-compiled, the default where kernels can be compiled"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CXX", "no-such-compiler")
    choice = choose_target("cpu-avx2")
    assert choice.target == "cpu-mixed"
    assert "no-such-compiler" in choice.reason


def test_without_an_instruction_set_that_has_kernels(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "old.yaml").write_text(
        "schema_version: 1\nname: old\nkind: cpu\ndevice: an old CPU\nisa: [sse2]\nsources: {isa: mine}\n"
    )
    choice = choose_target("old", tmp_path)
    assert choice.target == "cpu-mixed"
    assert "there are kernels for AVX-512 VNNI" in choice.reason


@pytest.mark.parametrize("profile", ["l4", "rtx-4090,rtx-3090"])
def test_a_gpu(profile: str) -> None:
    assert choose_target(profile).target == "cuda-int4"


def test_every_default_ships() -> None:
    shipped = {each.document.name for each in list_targets()}
    assert {choose_target(name).target for name in ("local", "cpu-avx512-vnni", "l4")} <= shipped


def test_an_unknown_profile() -> None:
    with pytest.raises(ConfigError, match="no profile is named nowhere"):
        choose_target("nowhere")


def test_a_model_that_kernels_compute_nothing_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 120, "intermediate_size": 120, "head_dim": 8}  # no multiples of 16
    sizes |= {"num_attention_heads": 15, "num_key_value_heads": 15, "num_hidden_layers": 1}
    model = save_tiny_model("llama", tmp_path / "m", tokenizer=True, eos_token_id=EOS, **sizes)
    with pytest.raises(SystemExit) as caught:
        main(("build", str(model), "-o", str(tmp_path / "out"), "--no-verify"))
    assert caught.value.code == 0
    told = capsys.readouterr().err
    assert "nothing that kernels can compute; building target cpu-mixed instead" in told
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["target"]["name"] == "cpu-mixed"


def test_standard_input_is_read_once_for_both_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[BuildPlan] = []

    def refuse(plan: BuildPlan, progress: object) -> None:
        plans.append(plan)
        raise KernelError("no region") if len(plans) == 1 else ConfigError("seen")

    monkeypatch.setattr("llmc.pipeline.build", refuse)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"one text")))
    with pytest.raises(SystemExit):
        main(("build", "demo", "--profile", "cpu-avx2", "--eval-text", "-", "-o", str(tmp_path / "out")))
    assert [plan.target.name for plan in plans] == ["cpu-mixed-compiled", "cpu-mixed"]
    assert {(plan.eval_text.text, plan.eval_text.names) for plan in plans} == {("one text", ("-",))}
