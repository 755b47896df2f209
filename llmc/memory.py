"""Determine how much memory this process may use, and how much of it is free.

A control group limits the total memory of its processes, and so does every group above it
(Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux). Cached pages of files count as
used there, but Linux reclaims them when memory is short, so that they are free; pages of tmpfs are not.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
#: Files of a control group: limits, usage, and the fields of memory.stat that can be reclaimed.
_V2 = (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
#: Limits of the process, and the line of /proc/self/status with the usage that each limits.
_PROCESS_LIMITS = (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData"))


@dataclass(frozen=True)
class _Bound:
    """The limit in bytes, and how much of it is used and cannot be reclaimed."""

    limit: int
    used: int


def available_memory(root: Path = _ROOT) -> int | None:
    """Return the bytes that this process may still use without swapping; None if the system does not tell.

    It is the least that the machine, each control group and the limits of the process (`ulimit -v`, `-d`)
    leave.

    Args:
        root: Folder that contains /proc and /sys.
    """
    stated = _size(_field(_read(root / "proc/meminfo"), "MemAvailable"))
    if stated is None:
        return None
    bounds = (*_group_bounds(root), *_process_bounds(root))
    return max(0, min([stated, *(bound.limit - bound.used for bound in bounds)]))


def trim_heap() -> None:
    """Return blocks that were freed to the system.

    glibc keeps those below 32 MB for itself. Does nothing if the C library has no `malloc_trim`.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def total_memory(root: Path = _ROOT) -> int | None:
    """Return the bytes that the machine and its control groups let this process use; None if unknown."""
    stated = _size(_field(_read(root / "proc/meminfo"), "MemTotal"))
    if stated is None:
        if os.name != "posix":
            return None
        stated = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([stated, *(bound.limit for bound in _group_bounds(root))])


def _group_bounds(root: Path) -> Iterator[_Bound]:
    """Yield the limits of the process's control groups and of all groups above them, v2 and v1."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            # Beside v1 hierarchies, v2 is mounted one level lower, usually without the memory controller.
            yield from _hierarchy(mount, path, _V2)
            yield from _hierarchy(mount / "unified", path, _V2)
        elif "memory" in controllers.split(","):
            yield from _hierarchy(mount / "memory", path, _V1)


def _hierarchy(
    mount: Path, path: str, files: tuple[tuple[str, ...], str, tuple[str, ...]]
) -> Iterator[_Bound]:
    """Yield the limits of the group at `path` and of the groups above it.

    Inside a container the path may be the host's and the mount may begin at the container's own group:
    missing levels are skipped.
    """
    limits, usage, reclaimable = files
    group = Path(path.lstrip("/"))
    for level in (group, *group.parents):
        folder = mount / level
        used = _size(_read(folder / usage))
        stated = [_size(_read(folder / name)) for name in limits]
        limit = min((value for value in stated if value is not None), default=None)
        if limit is None:
            continue
        counts = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if " " in line)
        cached = sum(int(counts.get(name, 0)) for name in reclaimable)
        yield _Bound(limit, max(0, (used or 0) - cached))


def _process_bounds(root: Path) -> Iterator[_Bound]:
    try:
        import resource
    except ImportError:  # Windows
        return
    status = _read(root / "proc/self/status")
    for name, field in _PROCESS_LIMITS:
        limit, _ = resource.getrlimit(getattr(resource, name))
        used = _size(_field(status, field))
        if limit != resource.RLIM_INFINITY and used is not None:
            yield _Bound(limit, used)


def _size(text: str) -> int | None:
    """Return the bytes of `1234` or of `1234 kB`; None for `max` and for an empty text."""
    number, _, unit = text.strip().partition(" ")
    if not number.isdecimal():
        return None
    return int(number) * (1024 if unit == "kB" else 1)


def _read(path: Path) -> str:
    """Read a file of /proc or /sys; empty if this system does not have it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, key: str) -> str:
    """Return the value of the first `key: value` line; empty if there is none."""
    values = (line.partition(":")[2] for line in text.splitlines() if line.startswith(f"{key}:"))
    return next(values, "").strip()
