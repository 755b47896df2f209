"""Processes that llmc starts end with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmc.children import run_apart

WORKER = "from llmc.children import die_with_parent; die_with_parent(); print(1, flush=True); input()"
PARENT = f"""
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
worker.stdout.readline()
print(worker.pid, flush=True)
worker.wait()
"""
#: A compiler's driver: it starts another process, and both take their time.
DRIVER = ["bash", "-c", "sleep 60 & echo $! > started; wait"]


def _ends(process: int) -> bool:
    """Whether a process is gone, or only waits for its new parent to take note."""
    for _ in range(100):
        try:
            if ") Z" in Path(f"/proc/{process}/stat").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_worker_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    assert _ends(worker)


def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_apart(DRIVER, tmp_path, 1, os.environ)
    assert _ends(int((tmp_path / "started").read_text()))


def test_an_interruption_ends_what_a_command_started(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 1)
    with pytest.raises(KeyboardInterrupt):
        run_apart(DRIVER, tmp_path, 60, os.environ)
    signal.signal(signal.SIGALRM, before)
    assert _ends(int((tmp_path / "started").read_text()))
