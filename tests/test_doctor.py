"""What the doctor finds, on this machine and on broken ones."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import llmc.doctor as doctor
from llmc.backends import backends
from llmc.doctor.gpu import check_cuda
from llmc.doctor.probe import Step, try_cuda
from llmc.errors import ExitCode
from tests.cuda import stub_environment

ROOT = Path(doctor.__file__).parents[2]


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


def examined(environment: dict[str, str]) -> dict[str, Any]:
    """Return what `llmc doctor --json` says on a machine, with the checks by their names."""
    command = [sys.executable, "-m", "llmc", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report | {"checks": {check["name"]: check for check in report["checks"]}}


def test_a_gpu_is_tried(cuda_stub: Path) -> None:
    """Kernels of the stub do nothing, which shows in their results."""
    report = examined(stub_environment(cuda_stub, capability="8.9", name="NVIDIA L4", memory=24 << 30))
    checks = report["checks"]
    assert (report["driver"], checks["nvidia driver"]["detail"]) == ("13.0", "for CUDA up to 13.0")
    assert report["gpus"] == [
        {
            "name": "NVIDIA L4",
            "compute_capability": "8.9",
            "memory_bytes": 24 << 30,
            "shares_memory": False,
            "uuid": "GPU-00000000-0000-0000-0000-000000000001",
            "runtimes": {"onnxruntime-gpu": True, "tensorrt_rtx": True, "tensorrt": True},
        }
    ]
    assert checks["nvidia gpu"]["status"] == "ok"
    assert checks["nvidia gpu"]["detail"] == (
        "NVIDIA L4, compute capability 8.9, 24.0 GiB: runs artifacts of onnxruntime-gpu, "
        "tensorrt_rtx, tensorrt"
    )
    assert checks["cuda libraries"]["status"] == "ok"
    assert checks["onnxruntime on cuda"]["status"] == "broken"
    assert checks["onnxruntime on cuda"]["detail"].startswith("a product of two matrices is off by ")
    assert checks["onnxruntime-genai on cuda"]["status"] == "ok"


def test_a_gpu_without_memory(cuda_stub: Path) -> None:
    check = examined(stub_environment(cuda_stub, memory=64))["checks"]["onnxruntime on cuda"]
    assert check["status"] == "broken"
    assert "Failed to allocate memory for requested buffer" in check["detail"]


def test_no_driver(cuda_stub: Path) -> None:
    lacking = ("libcuda.so.1", "libcublas.so.13", "libcufft.so.12")
    report = examined(stub_environment(cuda_stub, without=lacking))
    checks = report["checks"]
    assert (report["driver"], report["gpus"]) == (None, [])
    assert checks["nvidia driver"]["status"] == "absent"
    assert "nvidia gpu" not in checks
    assert checks["cuda libraries"] == {
        "name": "cuda libraries",
        "status": "absent",
        "detail": "missing: libcublas.so.13, libcufft.so.12; only a host with an NVIDIA GPU needs them",
        "hint": "pip install 'llmc[gpu]', or pip install nvidia-cublas nvidia-cufft",
    }


def test_an_old_driver(cuda_stub: Path) -> None:
    check = examined(stub_environment(cuda_stub, driver=12080))["checks"]["nvidia driver"]
    assert check["status"] == "broken"
    assert check["detail"] == "for CUDA up to 12.8, which is too old"
    assert check["hint"] == "install driver 580 or newer: onnxruntime-gpu needs CUDA 13"


def test_a_driver_that_fails(cuda_stub: Path) -> None:
    checks = examined(stub_environment(cuda_stub) | {"CUDA_STUB_INIT": "803"})["checks"]
    assert checks["nvidia driver"]["status"] == "broken"
    assert checks["nvidia driver"]["detail"].endswith("(803)")
    assert "onnxruntime on cuda" not in checks


def test_a_library_is_missing_beside_a_gpu(cuda_stub: Path) -> None:
    check = examined(stub_environment(cuda_stub, without=("libcufft.so.12",)))["checks"]["cuda libraries"]
    assert (check["status"], check["detail"]) == ("broken", "missing: libcufft.so.12")


def test_two_kinds_of_gpus_of_which_one_has_no_code(cuda_stub: Path) -> None:
    machine = stub_environment(cuda_stub, capability="10.0,9.0", name="NVIDIA B200,NVIDIA H200")
    checks = examined(machine)["checks"]
    assert checks["nvidia gpu"]["detail"] == (
        "NVIDIA B200, compute capability 10.0, 16.0 GiB: runs artifacts of tensorrt; not of onnxruntime-gpu, "
        "tensorrt_rtx, without code for it"
    )
    assert checks["nvidia gpu 2"]["hint"] == (
        "CUDA_VISIBLE_DEVICES=GPU-00000000-0000-0000-0000-000000000002 selects it instead of the first"
    )
    check = checks["onnxruntime on cuda"]
    assert check["detail"].startswith("the installed onnxruntime-gpu has no code for NVIDIA B200")
    assert check["hint"].endswith("selects the NVIDIA H200 of this machine")


def test_a_library_that_ends_the_process_is_one_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmc.doctor.probe.sys.executable", str(tmp_path / "python"))
    said = Step(name="libcudart.so.13").model_dump_json()
    (tmp_path / "python").write_text(f"#!/bin/sh\necho '{said}'\necho gone >&2\nkill -SEGV $$\n")
    (tmp_path / "python").chmod(0o755)
    steps = try_cuda()
    assert [step.name for step in steps] == ["libcudart.so.13", "libcublasLt.so.13"]
    assert steps[1].fault == "libcublasLt.so.13 ends its process with -11: gone"
    (finding,) = check_cuda(steps, gpu=True)
    assert (finding.status, finding.detail) == ("broken", steps[1].fault)
