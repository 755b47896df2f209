"""Commands that are ended from outside: by signals, by closed and full streams."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-c", "from llmc.cli import program; program()"]
#: `llmc doctor`, with an examination that writes an artifact and takes until it is interrupted.
WAITING = """
import time
from pathlib import Path
import llmc.doctor
from llmc.artifact.store.folder import staging
from llmc.scratch import record_output
def examine(*_):
    record_output(Path("out"))
    with staging(Path("out")) as draft:
        (draft.path / "model.onnx").touch()
        print("waits", flush=True)
        time.sleep(60)
llmc.doctor.examine = examine
from llmc.cli import program
program()
"""


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def _start(*before: str) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", WAITING, "doctor"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    return process


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_unwinds_the_command_and_has_its_exit_code(tmp_path: Path, name: str, code: int) -> None:
    process = _start("env", "--default-signal=INT,TERM,HUP")
    process.send_signal(getattr(signal, name))
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.endswith("error: interrupted\n" if name == "SIGINT" else f"error: interrupted by {name}\n")
    assert list(tmp_path.iterdir()) == []


def test_an_ignored_signal_stays_ignored() -> None:
    process = _start("env", "--ignore-signal=HUP")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def _shell(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = f'"$@" {redirection}'
    return subprocess.run(
        ["bash", "-c", script, "bash", *PROGRAM, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">/dev/full", 4, "error: standard output cannot be written: No space left on device"),
        (">&-", 141, "error: standard output is closed"),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        ("<&- 2>&-", 0, ""),
    ],
)
def test_closed_and_full_streams(redirection: str, code: int, said: str) -> None:
    done = _shell(redirection, "targets")
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert ("cpu-int4" in done.stdout) == (code == 0)


def test_an_error_that_cannot_be_said_has_its_exit_code() -> None:
    assert _shell("2>&-", "inspect", "nowhere").returncode == 2


def test_a_pipe_that_nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*PROGRAM, "targets"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == "error: standard output is closed: the output is lost\n"


def test_the_next_command_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    process = _start()
    assert len(list(tmp_path.iterdir())) == 3, "temporary files, the lock and the work folder"
    process.kill()
    process.communicate()
    (tmp_path / "foreign").mkdir()
    subprocess.run([*PROGRAM, "targets"], stdout=subprocess.DEVNULL, check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["foreign"]
