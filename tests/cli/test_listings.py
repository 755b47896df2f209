"""`llmc targets`, `llmc profiles` and `llmc build` up to the plan."""

import json
from pathlib import Path

import pytest

from llmc.cli import main
from llmc.config import Target
from llmc.document import load_document
from llmc.profile import Profile


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "targets")
    assert (code, err) == (0, "")
    files = (Path(__file__).parents[2] / "targets").iterdir()
    shipped = sorted(file.stem for file in files if not file.name.startswith("_"))
    assert "cpu-int4" in shipped
    assert [line.split()[0] for line in out.splitlines()] == shipped
    code, out, err = call(capsys, "targets", "--json")
    rows = json.loads(out)
    assert rows[0].keys() == {"name", "summary", "file"}
    assert all(Path(row["file"]).is_file() for row in rows)


def test_a_target_is_shown_as_it_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = call(capsys, "targets", "show", "cpu-int4")
    assert (code, err) == (0, "")
    (tmp_path / "shown.yaml").write_text(out)
    shown = load_document(tmp_path / "shown.yaml", Target)
    _, out, _ = call(capsys, "targets", "show", "cpu-int4", "--json")
    assert Target.model_validate_json(out) == shown


def test_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "profiles")
    assert (code, err) == (0, "")
    assert out.startswith("local ")
    assert "rtx-5090" in out
    _, out, _ = call(capsys, "profiles", "--json")
    assert {"name": "l4", "kind": "gpu"}.items() <= next(
        r for r in json.loads(out) if r["name"] == "l4"
    ).items()


def test_a_profile_is_shown_with_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "profiles", "show", "l4")
    assert code == 0
    assert "sources:" in out
    assert "NVIDIA L4 Tensor Core GPU data sheet" in out


def test_local_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "profiles", "show", "local", "--json")
    assert code == 0
    assert Profile.model_validate_json(out).name == "local"


def test_detection_measures(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "profiles", "detect", "--cpu", "--json")
    assert (code, err) == (0, "")
    profile = Profile.model_validate_json(out)
    assert profile.bandwidth_gbs is not None
    assert profile.bandwidth_gbs > 0.5


def test_an_own_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text(
        "schema_version: 1\nname: mine\nkind: cpu\ndevice: my CPU\n"
    )
    code, out, _ = call(capsys, "profiles", "--path", str(tmp_path))
    assert code == 0
    assert "my CPU" in out
    code, out, _ = call(capsys, "profiles", "show", "mine", "--path", str(tmp_path))
    assert (code, "my CPU" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "fact", "hint"),
    [
        (("targets", "show", "cpu-int5"), "no target is named cpu-int5", "did you mean cpu-int"),
        (("profiles", "show", "l44"), "no profile is named l44", "did you mean l4 or"),
        (("build", "demo", "--target", "cpu-int5"), "no target is named cpu-int5", "did you mean"),
        (("build", "demo", "--profile", "l44"), "no profile is named l44", "did you mean"),
        (
            ("build", "demo", "--target", "cpu-int4", "--profile", "l4"),
            "target cpu-int4 runs on a CPU and profile l4",
            "llmc profiles",
        ),
        (
            ("build", "demo", "--path", "/nowhere"),
            "/nowhere (from --path) has neither",
            "name their parent folder",
        ),
        (("build", "demo", "--eval-text", "/nowhere.txt"), "evaluation text /nowhere.txt is not a file", ""),
    ],
)
def test_what_is_not_there(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], fact: str, hint: str
) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {fact}")
    assert f"hint: {hint}" in err if hint else "hint:" not in err
