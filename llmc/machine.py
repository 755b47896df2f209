"""Describe the machine at hand as the profile `local`."""

import gc
import math
import os
import platform
import time
from collections import Counter
from pathlib import Path

from llmc.gpu import Gpu, gpus
from llmc.memory import total_memory, trim_heap
from llmc.profile import Profile, ProfileKind

LOCAL = "local"

# The flags of /proc/cpuinfo that decide which kernels a CPU runtime selects; x86-64, then AArch64.
_ISA = frozenset(
    (
        *("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "avx_vnni"),
        *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
        *("avx512_vnni", "avx512_bf16", "avx512_fp16"),
        *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
        *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme", "sme2"),
    )
)


def detect_profile(*, gpu: bool = True, measure: bool = False) -> Profile:
    """Describe this machine: its first NVIDIA GPU if there is one and `gpu` is set, else its CPU.

    Args:
        gpu: Whether to look for a GPU.
        measure: Whether to measure the read bandwidth of main memory, which takes a second or two; CPU only.
    """
    if gpu:
        gpu_profile = detect_gpu()
        if gpu_profile is not None:
            return gpu_profile
    return detect_cpu(measure=measure)


def detect_gpu() -> Profile | None:
    """Describe the GPU that CUDA gives to this process first; None without a driver or a GPU.

    Memory that a GPU shares with the CPU is left out: the driver then states the host's.

    Raises:
        ResourceError: There is a driver, but it does not work.
    """
    found = gpus()
    if not found:
        return None
    first = found[0]
    source = "NVIDIA's driver"
    sources = {"compute_capability": source}
    if not first.integrated:
        sources["memory_gib"] = source
    return Profile(
        schema_version=1,
        name=LOCAL,
        kind=ProfileKind.GPU,
        device=first.name,
        compute_capability=first.capability,
        memory_gib=None if first.integrated else round(first.memory_bytes / 2**30, 1),
        sources=sources,
        notes=_describe_several(found),
    )


def _describe_several(found: tuple[Gpu, ...]) -> str:
    """Describe what is used where CUDA lists several GPUs; empty where it lists one."""
    if len(found) == 1:
        return ""
    others = Counter(gpu.name for gpu in found[1:])
    if set(others) == {found[0].name}:
        return f"{len(found)} GPUs are visible to CUDA; the first is used."
    listed = ", ".join(f"{count} {name}" for name, count in others.items())
    return (
        f"{len(found)} GPUs are visible to CUDA; the first, {found[0].name}, is used. "
        f"The others are {listed}: CUDA_VISIBLE_DEVICES selects one."
    )


def detect_cpu(*, measure: bool = False) -> Profile:
    """Describe the CPU: model, instruction sets, physical cores that this process may use, memory."""
    cpuinfo = _read("/proc/cpuinfo")
    threads = usable_cores()
    memory = total_memory()
    sources: dict[str, str] = {}
    if memory is not None:
        sources["memory_gib"] = "the operating system's total, or the limit of the control group if lower"
    bandwidth = None
    if measure:
        workers = threads or os.cpu_count() or 1
        bandwidth = measure_read_bandwidth(workers)
        sources["bandwidth_gbs"] = f"measured: reads from main memory by {workers} threads, best of 8 passes"
    return Profile(
        schema_version=1,
        name=LOCAL,
        kind=ProfileKind.CPU,
        device=_field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        isa=tuple(sorted(_ISA & set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split()))),
        threads=threads,
        memory_gib=round(memory / 2**30, 1) if memory is not None else None,
        bandwidth_gbs=bandwidth,
        sources=sources,
    )


#: Bytes of growth above which collecting garbage is worth its time.
_WORTH_RELEASING = 64 << 20


class _Resident:
    """The resident memory after the last release, in bytes."""

    after_release = 0


def release_memory() -> None:
    """Collect garbage, and return the freed memory that the C library holds to the system.

    glibc keeps freed blocks below 32 MB for itself, which is most of a model. Only collects garbage if the C
    library has no `malloc_trim`, and does nothing while the process has grown by less than 64 MB since the
    last release: a collection visits some millions of objects of torch and onnx, half a second of work,
    however little there is to free.
    """
    resident = _resident_bytes()
    if resident is not None and resident < _Resident.after_release + _WORTH_RELEASING:
        return
    collect_garbage()
    _Resident.after_release = _resident_bytes() or 0


def _resident_bytes() -> int | None:
    """Return the resident memory of this process; None if the system does not report it."""
    pages = _read("/proc/self/statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None


def collect_garbage() -> None:
    """Do what `release_memory` does, whether or not it is worth its time."""
    gc.collect()
    trim_heap()


def usable_cores() -> int | None:
    """Return the number of physical cores among this process's CPUs, at most its control group's quota.

    Returns None if /proc/cpuinfo is missing: the runtime then counts for itself.
    """
    cpuinfo = _read("/proc/cpuinfo")
    if not cpuinfo:
        return None
    allowed = os.sched_getaffinity(0)
    cores = set()
    for block in cpuinfo.split("\n\n"):
        number = _field(block, "processor")
        if number.isdecimal() and int(number) in allowed:
            core = _field(block, "core id")
            cores.add((_field(block, "physical id"), core) if core else number)
    count = len(cores) or len(allowed)
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.strip().isdecimal():
        count = min(count, max(1, math.ceil(int(quota) / int(period))))
    return count


def measure_read_bandwidth(threads: int, *, array_bytes: int = 2**27, passes: int = 8) -> float:
    """Measure the GB/s (10**9 bytes) that `threads` threads read at once, each from its own array.

    The arrays must be larger than the caches. The best pass counts, since other load can only slow a pass
    down. `bitwise_or.reduce` on 64-bit words is the least arithmetic per byte that NumPy offers.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    arrays = [np.ones(array_bytes // 8, dtype=np.uint64) for _ in range(threads)]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, arrays))
            best = min(best, time.perf_counter() - start)
    return round(threads * array_bytes / best / 1e9, 1)


def _read(path: str) -> str:
    """Read a file of /proc or /sys; empty if this system does not have it."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, key: str) -> str:
    """Return the value of the first `key : value` line; empty if there is none."""
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            return value.strip()
    return ""
