"""`benchmarks/gpu.py` runs on the CPU, and over a stub of CUDA whose kernels compute nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.artifact.store.folder import open_artifact
from llmc.runtime.ort_model import OrtModel
from tests.cuda import stub_environment

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "benchmarks" / "gpu.py"
sys.path.insert(0, str(PROGRAM.parent))

from gpu_checks.record import Identity, Outcome, Record, Status  # noqa: E402
from gpu_checks.seeded import draw_weights, drop_weights, lacks_weights  # noqa: E402

ARTIFACT = "llama-cuda-int4"
PYTORCH, GENAI = f"pytorch/{ARTIFACT}", f"genai/{ARTIFACT}"


def start(folder: Path, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start the program over the artifacts in `folder`, with its results beside them."""
    command = [sys.executable, str(PROGRAM), "--out", str(folder / "out.json"), "--artifacts", str(folder)]
    return subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**(os.environ if environment is None else environment), "PYTHONPATH": str(ROOT)},
    )


def run(folder: Path, *options: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run the program; return its exit code and its table."""
    process = start(folder, *options, environment=environment)
    table, said = process.communicate(timeout=120)
    assert "Traceback" not in said
    return process.returncode, table


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the outcomes by their checks."""
    document = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert document["schema_version"] == 1
    return {outcome["check"]: outcome for outcome in document["outcomes"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on the CPU that builds one artifact and compares it with PyTorch."""
    folder = tmp_path_factory.mktemp("gpu")
    code, table = run(folder, "--device", "cpu", "--only", f"probe,environment,{ARTIFACT}")
    assert code == 0, table
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


def test_on_the_cpu_every_figure_of_a_gpu_is_not_measured(built: Path) -> None:
    settled = outcomes(built)
    for check in ("probe", "environment", f"parity/{ARTIFACT}", f"placement/{ARTIFACT}"):
        assert settled[check]["status"] == "not measured"
        assert settled[check]["why"] == "the CPU is asked for"
        assert not settled[check]["figures"]
    assert settled[f"build/{ARTIFACT}"]["status"] == "measured"
    assert settled[PYTORCH]["figures"]["decode_max_abs"] < 0.05
    assert "CPUExecutionProvider" in settled[PYTORCH]["figures"]["where"]
    assert settled[GENAI]["figures"]["cpu_logit_gap"] < 0.05
    assert not [name for name in settled[GENAI]["figures"] if name.endswith("_ms")]


def test_without_time_nothing_is_measured(tmp_path: Path) -> None:
    code, table = run(tmp_path, "--minutes", "0")
    assert code == 0
    assert {outcome["status"] for outcome in outcomes(tmp_path).values()} == {"not measured"}
    assert "doctor " in table
    assert "not measured: out of time" in table
    assert "0 measured, 0 failed" in table


def test_over_the_stub_checks_run_and_no_figure_is_believed(folder: Path, cuda_stub: Path) -> None:
    names = f"environment,{ARTIFACT},decode/demo-cuda-int4"
    code, table = run(folder, "--only", names, environment=stub_environment(cuda_stub, name="Nothing 1"))
    assert code == 0, table
    settled = {check: o for check, o in outcomes(folder).items() if o["identity"]["device"] != "cpu"}
    assert settled["environment"]["figures"]["gpu"].startswith("Nothing 1, compute capability 9.0")
    assert settled["probe"]["why"].startswith("the device computes nothing: a product of two matrices is off")
    speeds = [f"{check}/{ARTIFACT}/1x128" for check in ("decode", "ttft", "energy", "memory")]
    for check in (f"parity/{ARTIFACT}", f"placement/{ARTIFACT}", PYTORCH, GENAI, *speeds):
        assert (settled[check]["status"], settled[check]["why"]) == (
            "not measured",
            "the device computes nothing",
        )
        assert not settled[check]["figures"]
        assert settled[check]["seconds"] > 0
    assert settled["decode/demo-cuda-int4/1x128"]["why"] == "the device computes nothing"
    assert "build/demo-cuda-int4" not in settled


def test_a_missing_library_is_told_by_every_check_that_needs_it(folder: Path, cuda_stub: Path) -> None:
    environment = stub_environment(cuda_stub, without=("libcurand.so.10",))
    code, _ = run(folder, "--only", f"parity/{ARTIFACT}", environment=environment)
    settled = {check: o for check, o in outcomes(folder).items() if o["identity"]["device"] != "cpu"}
    assert code == 0
    for check in ("probe", f"parity/{ARTIFACT}"):
        assert settled[check]["status"] == "not measured"
        assert "libcurand.so.10" in settled[check]["why"]


def test_a_run_that_was_killed_goes_on(folder: Path) -> None:
    (folder / "out.json").unlink()
    names = ("--device", "cpu", "--only", f"doctor,{PYTORCH},{GENAI}")
    process = start(folder, *names)
    wait_until(lambda: (folder / "out.json").is_file())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = outcomes(folder)
    assert first["doctor"]["status"] == "measured"
    code, _ = run(folder, *names)
    second = outcomes(folder)
    assert code == 0
    assert set(second) == {"doctor", PYTORCH, GENAI}
    assert all(second[check] == outcome for check, outcome in first.items())


def test_a_check_whose_process_dies_is_a_line(folder: Path) -> None:
    process = start(folder, "--device", "cpu", "--only", "doctor")
    (folder / "out.json").unlink()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: workers(children) != [])
    os.kill(workers(children)[0], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert outcomes(folder)["doctor"]["why"] == "the process ended with signal SIGKILL"


def test_an_artifact_with_other_weights_fails(folder: Path) -> None:
    (folder / "out.json").unlink()
    file = folder / ARTIFACT / "model.onnx.data"
    weights = np.frombuffer(file.read_bytes(), np.uint8).copy()
    weights[: len(weights) // 2] ^= 0x55
    file.write_bytes(weights.tobytes())
    code, table = run(folder, "--device", "cpu", "--only", PYTORCH)
    assert code == 1
    assert outcomes(folder)[PYTORCH]["status"] == "failed"
    assert "logits, the bound is 0.5" in table


def test_a_name_that_no_check_has_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path, "--only", "speed")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "no check is named speed" in said


@pytest.mark.parametrize("minutes", ["nan", "-1", "inf", "soon"])
def test_a_time_that_is_not_one_is_refused(tmp_path: Path, minutes: str) -> None:
    process = start(tmp_path, f"--minutes={minutes}")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"{minutes} is not a number of minutes" in said


def test_results_that_are_not_of_this_schema_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("{}{", encoding="utf-8")
    process = start(tmp_path, "--minutes", "0")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "is not a file of results" in said


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    process = start(tmp_path / "file", "--minutes", "0")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot be written to" in said
    assert "Traceback" not in said


def test_one_run_at_a_time_and_none_is_left_after_sigterm(folder: Path) -> None:
    (folder / "out.json").unlink()
    process = start(folder, "--device", "cpu", "--only", "doctor")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: workers(children) != [])
    (worker,) = workers(children)
    other = start(folder, "--minutes", "0")
    assert "is in use" in other.communicate(timeout=60)[1]
    assert other.returncode == 1
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert not Path(f"/proc/{worker}").exists()


def test_a_check_that_failed_stays_failed_where_there_is_no_time(tmp_path: Path) -> None:
    identity = Identity(artifact=None, versions={}, device="cpu")
    record = Record(tmp_path / "out.json", "machine")
    record.put(Outcome(check="a", identity=identity, status=Status.FAILED, why="wrong"))
    late = Outcome(check="a", identity=identity, status=Status.NOT_MEASURED, why="out of time")
    assert record.put(late).why == "wrong"
    other = identity.model_copy(update={"device": "NVIDIA L4"})
    assert Record(tmp_path / "out.json", "machine").find("a", other) is None


def test_weights_are_drawn_the_same_each_time(built: Path, tmp_path: Path) -> None:
    drawn = []
    for name in ("first", "second"):
        artifact = Path(shutil.copytree(built / ARTIFACT, tmp_path / name))
        before = (artifact / "model.onnx.data").read_bytes()
        drop_weights(artifact, least=256)
        assert lacks_weights(artifact)
        draw_weights(artifact)
        drawn.append((artifact / "model.onnx.data").read_bytes())
        assert not lacks_weights(artifact)
        assert len(drawn[-1]) == len(before)
        assert drawn[-1] != before
    assert drawn[0] == drawn[1]
    interface = open_artifact(tmp_path / "first").manifest.interface
    model = OrtModel(tmp_path / "first", interface, threads=1, share_buffer=True)
    logits = model.prefill(np.arange(3, 43)[None], steps=0)
    assert 0.01 < logits.std() < 10


def workers(children: Path) -> Sequence[int]:
    """Return the processes that run checks: they were started by multiprocessing, and are not its tracker."""
    found = []
    for each in children.read_text(encoding="ascii").split():
        try:
            command = Path(f"/proc/{each}/cmdline").read_text(encoding="utf-8")
        except OSError:
            continue
        if "spawn_main" in command:
            found.append(int(each))
    return found


def wait_until(condition: Any) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
