"""The machine at hand: its CPU, and how its GPUs are described."""

import os
import platform
from pathlib import Path

import numpy as np
import pytest

import llmc.machine as machine
from llmc.gpu import Gpu
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


def gpu(name: str, capability: str, *, integrated: bool = False) -> Gpu:
    return Gpu(name, capability, 23034 << 20, "GPU-00000000-0000-0000-0000-000000000001", integrated)


def test_the_first_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    l4, t4 = gpu("NVIDIA L4", "8.9"), gpu("Tesla T4", "7.5")
    monkeypatch.setattr(machine, "gpus", lambda: (l4, l4))
    profile = machine.detect_profile()
    assert (profile.device, profile.compute_capability, profile.memory_gib) == ("NVIDIA L4", "8.9", 22.5)
    assert profile.notes == "2 GPUs are visible to CUDA; the first is used."
    monkeypatch.setattr(machine, "gpus", lambda: (t4, l4, l4))
    assert machine.detect_profile().notes == (
        "3 GPUs are visible to CUDA; the first, Tesla T4, is used. The others are 2 NVIDIA L4: "
        "CUDA_VISIBLE_DEVICES selects one."
    )


def test_shared_memory_is_not_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (gpu("NVIDIA GB10", "12.1", integrated=True),))
    profile = machine.detect_profile()
    assert (profile.device, profile.memory_gib, profile.notes) == ("NVIDIA GB10", None, "")
    assert "memory_gib" not in profile.sources


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: ())
    assert machine.detect_profile().kind is ProfileKind.CPU


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
