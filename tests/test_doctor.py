"""What the doctor finds, on this machine and on broken ones."""

import re
import tomllib
from pathlib import Path

import pytest

import llmc.doctor as doctor
from llmc.backends import backends
from llmc.errors import ExitCode

ROOT = Path(doctor.__file__).parent.parent


def test_this_machine_can_build(tmp_path: Path) -> None:
    report = doctor.examine(tmp_path / "artifacts")
    assert report.failure() is None, report.render()
    found = {check.name: check for check in report.checks}
    assert found["torch"].detail == doctor.installed_versions()["torch"]
    assert found["onnxruntime"].status == found["onnxruntime-genai"].status == "ok"
    assert f"GB free at {tmp_path}" in found["disk"].detail


def test_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    check = doctor.check_compiler()
    assert (check.status, check.hint) == ("ok", None)
    monkeypatch.setenv("LLMC_CXX", "/nowhere/c++")
    check = doctor.check_compiler()
    assert check.status == "absent"
    assert check.detail == "the C++ compiler /nowhere/c++ cannot be started: No such file or directory"
    assert "pip install 'llmc[compile]'" in (check.hint or "")


def test_it_looks_for_what_is_required() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["dependencies"]
    names = {re.split(r"[><=;\s]", line)[0] for line in declared}
    assert names == {*doctor.REQUIRED, *doctor.RUNTIMES, *doctor.GENERATORS, "tensorrt-rtx-cu13"}
    lowest = doctor.REQUIRED["transformers"]
    assert f"transformers>={'.'.join(map(str, lowest))}" in declared


def test_it_looks_for_what_backends_name(tmp_path: Path) -> None:
    found = [check.name for check in doctor.examine(tmp_path).checks]
    named = [name for backend in backends() for name in backend.packages]
    assert {"tensorrt-rtx-cu13", "tensorrt", "cuda-bindings"} <= set(named)
    start = found.index(named[0])
    assert found[start : start + len(named)] == named


def test_a_missing_package() -> None:
    check = doctor.check_package("gguf", (), {})
    assert (check.status, check.detail, check.hint) == ("problem", "not installed", "pip install 'gguf'")


@pytest.mark.parametrize(("version", "status"), [("4.57.6", "problem"), ("5.24.0", "ok"), ("6.0.dev0", "ok")])
def test_an_old_package(version: str, status: str) -> None:
    check = doctor.check_package("transformers", (5, 24), {"transformers": version})
    assert check.status == status
    if status == "problem":
        assert check.detail == "4.57.6 is too old"
        assert check.hint == "pip install 'transformers>=5.24'"


def flavours(versions: dict[str, str], module: str = "onnxruntime") -> doctor.Finding:
    return doctor.check_flavours("onnxruntime", doctor.RUNTIMES, versions, module=module)


def test_two_flavours_at_once() -> None:
    check = flavours({"onnxruntime": "1.2", "onnxruntime-gpu": "1.3"})
    assert check.status == "problem"
    assert check.detail == "onnxruntime 1.2 and onnxruntime-gpu 1.3 overwrite each other"
    assert (check.hint or "").startswith(
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime"
    )


def test_no_flavour() -> None:
    check = flavours({})
    assert (check.status, check.detail) == ("problem", "not installed")
    assert check.hint == f"pip install onnxruntime{'-gpu' if doctor.runs_gpu_wheels() else ''}"


def test_a_flavour_that_does_not_load() -> None:
    check = flavours({"onnxruntime": "1.2"}, module="a_module_that_is_not_there")
    assert check.status == "problem"
    assert check.detail.startswith("onnxruntime 1.2 does not load: No module named")


def test_little_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "DISK_BYTES", 10**18)
    monkeypatch.setattr(doctor, "available_memory", lambda: 500_000_000)
    disk, memory = doctor.check_disk(tmp_path), doctor.check_memory()
    assert (disk.status, memory.status) == ("problem", "problem")
    assert memory.detail == "0.5 GB available"


def test_a_problem_is_exit_code_4() -> None:
    report = doctor.DoctorReport(
        checks=(
            doctor.Finding(name="torch", status="ok", detail="2"),
            doctor.Finding(name="gguf", status="problem", detail="not installed", hint="pip install gguf"),
        )
    )
    failure = report.failure()
    assert failure is not None
    assert failure.exit_code is ExitCode.RESOURCES
    assert failure.fact == "a CPU build cannot work here: gguf"
    assert failure.hint == "pip install gguf"
    assert "PROBLEM  gguf   not installed" in report.render()
    assert "hint: pip install gguf" in report.render()
