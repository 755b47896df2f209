"""Whoever decides by memory asks for what the container leaves, not for what the machine has."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmc import doctor, machine
from llmc.memory import available_memory, total_memory
from llmc.pipeline.gate import loaders
from llmc.pipeline.steps.original import is_large
from llmc.progress import SilentProgress

GIB = 1 << 30


@pytest.fixture(autouse=True)
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 GiB, 12 of them free; a container of 4 GiB, of which 1 GiB is used."""
    files = {
        "proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable: {12 << 20} kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{GIB}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for function in (available_memory, total_memory):
        monkeypatch.setattr(function, "__defaults__", (tmp_path,))


@pytest.mark.parametrize(("gib", "large"), [(1, False), (2, True), (5, True)])
def test_an_original_beyond_half_of_what_is_left_is_streamed(gib: int, large: bool) -> None:
    checkpoint: Any = SimpleNamespace(reference_bytes=lambda: gib * GIB)
    assert is_large(checkpoint) is large


@pytest.mark.parametrize(("gib", "fits"), [(1, True), (2, False), (5, False)])
def test_a_second_reading_needs_half_of_what_is_left(
    gib: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(loaders, "_recall", lambda *_, fits: asked.append(fits))
    checkpoint: Any = SimpleNamespace(reference_bytes=lambda: gib * GIB)
    loaders.measure_loaders(checkpoint, "0" * 64, SilentProgress())
    assert asked == [fits]


def test_doctor_and_the_local_profile_state_the_limit() -> None:
    assert doctor.check_memory().detail == f"{3 * GIB / 1e9:.1f} GB available"
    assert machine.detect_cpu().memory_gib == 4.0
