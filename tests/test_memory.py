"""Free memory on machines, in containers of both kinds of control groups, and under ulimit."""

import resource
from pathlib import Path

import pytest

from llmc.memory import available_memory, total_memory

GIB = 1 << 30
STAT_V1 = f"cache {3 * GIB}\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n"
STAT_V2 = f"anon 1\nfile {3 * GIB}\nshmem {GIB}\ninactive_file {GIB}\nactive_file {GIB}\n"


def system(root: Path, groups: str, **files: str) -> Path:
    """A machine of 16 GiB, 8 of them free, whose process is in `groups`."""
    mem = f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {8 << 20} kB\n"
    stated = {"proc/meminfo": mem, "proc/self/cgroup": groups, **files}
    for name, text in stated.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def group(path: str, limit: str, used: int, *, v1: bool = False, **files: str) -> dict[str, str]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    stat = STAT_V1 if v1 else STAT_V2
    values = {names[0]: limit, names[1]: str(used), "memory.stat": stat, **files}
    return {f"sys/fs/cgroup/{path}/{name}": f"{text}\n" for name, text in values.items()}


@pytest.mark.parametrize(
    ("groups", "files", "free", "total"),
    [
        ("0::/\n", {}, 8, 16),
        ("0::/\n", group("", str(4 * GIB), 5 * GIB), 1, 4),
        ("0::/\n", group("", "max", 5 * GIB), 8, 16),
        ("0::/\n", group("", "max", 5 * GIB, **{"memory.high": str(6 * GIB)}), 3, 6),
        ("0::/\n", group("", str(4 * GIB), 7 * GIB), 0, 4),
        ("0::/a/b\n", group("a/b", "max", GIB) | group("a", str(4 * GIB), 4 * GIB), 2, 4),
        ("0::/of/the/host\n", group("", str(4 * GIB), 4 * GIB), 2, 4),
        ("9:name=systemd:/\n4:memory:/a\n0::/\n", group("memory/a", str(4 * GIB), 5 * GIB, v1=True), 1, 4),
        ("5:cpu,memory:/gone\n", group("memory", "9223372036854771712", 5 * GIB, v1=True), 8, 16),
    ],
    ids=["bare", "limit", "no-limit", "high", "over", "parent", "namespace", "v1", "v1-none"],
)
def test_free_memory(tmp_path: Path, groups: str, files: dict[str, str], free: int, total: int) -> None:
    root = system(tmp_path, groups, **files)
    assert available_memory(root) == free * GIB
    assert total_memory(root) == total * GIB


def test_limits_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = system(tmp_path, "0::/\n", **{"proc/self/status": f"VmSize:\t{2 << 20} kB\nVmData:\t0 kB\n"})
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (5 * GIB if which == resource.RLIMIT_AS else -1, -1)
    )
    assert available_memory(root) == 3 * GIB


def test_systems_that_do_not_tell(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert total_memory(tmp_path) == total_memory(Path("/nowhere"))


def test_this_machine() -> None:
    free, total = available_memory(), total_memory()
    assert free is not None
    assert total is not None
    assert 0 < free <= total
