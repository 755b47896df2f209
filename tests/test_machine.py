"""The machine at hand, and the answers of nvidia-smi."""

import os
import platform
from pathlib import Path

import numpy as np
import pytest

import llmc.machine as machine
from llmc.errors import ResourceError
from llmc.profile import ProfileKind


def test_this_cpu() -> None:
    profile = machine.detect_profile(gpu=False)
    assert profile.name == "local"
    assert profile.kind is ProfileKind.CPU
    assert profile.device
    assert profile.bandwidth_gbs is None
    assert profile == machine.detect_profile(gpu=False)
    if Path("/proc/cpuinfo").exists():
        assert profile.threads is not None
        assert 1 <= profile.threads <= (os.cpu_count() or 1)
        assert profile.memory_gib is not None
        assert set(profile.isa) <= set(Path("/proc/cpuinfo").read_text().split())


def test_bandwidth_is_said_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure_read_bandwidth", lambda threads: 10.0 * threads)
    monkeypatch.setattr(machine, "usable_cores", lambda: 3)
    profile = machine.detect_profile(gpu=False, measure=True)
    assert profile.bandwidth_gbs == 30.0
    assert profile.sources["bandwidth_gbs"].startswith("measured: reads from main memory by 3 threads")


def test_measuring_bandwidth() -> None:
    assert 0.1 < machine.measure_read_bandwidth(1, array_bytes=2**22, passes=2) < 10_000


def files(monkeypatch: pytest.MonkeyPatch, **contents: str) -> None:
    names = {
        "cpuinfo": "/proc/cpuinfo",
        "quota": "/sys/fs/cgroup/cpu.max",
    }
    texts = {names[key]: text for key, text in contents.items()}
    monkeypatch.setattr(machine, "_read", lambda path: texts.get(path, ""))


CPUINFO = "".join(
    f"processor\t: {number}\nphysical id\t: 0\ncore id\t: {number // 2}\nflags\t: fpu avx2 zzz\n\n"
    for number in range(8)
)


def test_cores_not_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch, cpuinfo=CPUINFO)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.usable_cores() == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert machine.usable_cores() == 2


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("10000 100000", 1), ("max 100000", 4)])
def test_a_control_group_has_its_quota(quota: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch, cpuinfo=CPUINFO, quota=quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.usable_cores() == cores


def test_cpuinfo_without_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch, cpuinfo="processor : 0\nFeatures : asimd bf16\n\nprocessor : 1\nFeatures : asimd\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert machine.usable_cores() == 2
    assert machine.detect_cpu().isa == ("asimd", "bf16")


def test_the_first_gpu_is_described() -> None:
    profile = machine.parse_gpu("NVIDIA L4, 8.9, 23034\nNVIDIA L4, 8.9, 23034\n")
    assert profile is not None
    assert (profile.device, profile.compute_capability, profile.memory_gib) == ("NVIDIA L4", "8.9", 22.5)
    assert profile.notes == "2 GPUs are present; the first is described."


def test_shared_memory_is_not_stated() -> None:
    profile = machine.parse_gpu("NVIDIA GB10, 12.1, [N/A]\n")
    assert profile is not None
    assert profile.memory_gib is None
    assert "memory_gib" not in profile.sources


def test_no_gpu_listed() -> None:
    assert machine.parse_gpu("No devices were found\n") is None


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, 'echo "NVIDIA H200, 9.0, 143771"')
    profile = machine.detect_profile()
    assert (profile.kind, profile.device, profile.memory_gib) == (ProfileKind.GPU, "NVIDIA H200", 140.4)
    fake_smi(tmp_path, monkeypatch, "echo failed to talk to the driver; exit 9")
    assert machine.detect_profile().kind is ProfileKind.CPU
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert machine.detect_gpu() is None


def test_a_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, "exec sleep 5")
    monkeypatch.setattr(machine, "_NVIDIA_SMI_SECONDS", 0.2)
    with pytest.raises(ResourceError, match="did not answer"):
        machine.detect_gpu()


def test_freed_memory_goes_back_to_the_system() -> None:
    """Blocks of a megabyte below one that is held: glibc keeps them, and gives them back when asked to."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    np.ones(1 << 22).sum()  # blocks up to this size come from the heap once one was freed
    blocks = [np.ones(1 << 17) for _ in range(200)]
    held = blocks.pop()
    del blocks
    before = resident()
    machine.release_memory()
    assert held.sum() == 1 << 17
    if platform.libc_ver()[0] == "glibc":
        assert resident() < before - (100 << 20)


def test_nothing_is_collected_while_memory_has_hardly_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    monkeypatch.setattr(machine.gc, "collect", lambda: collected.append(1))
    held = np.ones(20 << 20)  # 160 MB
    machine.release_memory()
    machine.release_memory()
    assert (held[0], len(collected)) == (1, 1)
