"""From what a user typed to a resolved plan."""

from pathlib import Path

import pytest

from llmc.errors import ConfigError
from llmc.evaluation import EvaluationText, read_text
from llmc.plan import default_output, plan_build, read_eval_text


def test_a_plan_is_resolved(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("words")
    text = read_eval_text([str(file)], verify=True)
    plan = plan_build("demo", target="cuda-fp16", profile="l4", verify=False, eval_text=text)
    assert (plan.target.name, plan.profile.name, plan.verify) == ("cuda-fp16", "l4", False)
    assert plan.output == Path("artifacts/demo/cuda-fp16@l4")
    assert plan.eval_text == EvaluationText(text="words", names=(str(file),))


def test_the_output_is_the_users(tmp_path: Path) -> None:
    assert plan_build("demo", target="cpu-fp32", profile="local", output=tmp_path).output == tmp_path


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("demo", "demo"),
        ("org/name@rev", "org--name@rev"),
        ("../files/Model.Q4_1.gguf", "Model.Q4_1"),
        ("..", "model"),
        ("a b:c", "a-b-c"),
    ],
)
def test_default_output(model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "model" / "here"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert default_output(model, "t", "p") == Path("artifacts") / name / "t@p"


def test_a_folder_goes_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path / "my-model")
    assert default_output(".", "t", "p") == Path("artifacts/my-model/t@p")


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MODEL is empty"):
        plan_build(" ", target="cpu-fp32", profile="local")
    for verify in (True, False):
        with pytest.raises(ConfigError, match=r"absent\.txt is not a file"):
            read_eval_text([str(tmp_path / "absent.txt")], verify=verify)


def test_text_is_not_read_for_a_build_without_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert read_eval_text(["-"], verify=False) == read_text(())


def test_several_profiles_are_for_engines() -> None:
    plan = plan_build("demo", target="tensorrt-fp16", profile="l4,rtx-4090")
    assert [p.name for p in (plan.profile, *plan.also)] == ["l4", "rtx-4090"]
    assert plan.output == Path("artifacts/demo/tensorrt-fp16@l4+rtx-4090")
    with pytest.raises(ConfigError, match="target cuda-int4 is built for one profile, and 2 are named"):
        plan_build("demo", target="cuda-int4", profile="l4,rtx-4090")
    with pytest.raises(ConfigError, match="names a profile twice, or has an empty name"):
        plan_build("demo", target="tensorrt-fp16", profile="l4,l4")
