"""Describe the machine at hand as the profile `local`."""

import ctypes
import gc
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from llmc.errors import ResourceError
from llmc.memory import total_memory
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

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits")
_NVIDIA_SMI_SECONDS = 20.0


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
    """Describe the first GPU that nvidia-smi lists; None without a driver or a GPU."""
    try:
        answer = subprocess.run(
            _NVIDIA_SMI, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=False
        )
    except (FileNotFoundError, PermissionError):
        return None
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            f"nvidia-smi did not answer within {_NVIDIA_SMI_SECONDS:.0f} s",
            hint="the driver hangs: name a profile instead of local",
        ) from error
    return parse_gpu(answer.stdout) if answer.returncode == 0 else None


def parse_gpu(listing: str) -> Profile | None:
    """Parse the first GPU of `nvidia-smi --query-gpu=name,compute_cap,memory.total`, memory in MiB.

    Memory shared with the CPU is printed as `[N/A]` and is then left out.
    """
    lines = [line for line in listing.splitlines() if line.count(",") == 2]
    if not lines:
        return None
    name, capability, memory = (field.strip() for field in lines[0].split(","))
    tool = "nvidia-smi"
    sources = {"compute_capability": tool}
    memory_gib = None
    if memory.isdecimal():
        memory_gib = round(int(memory) / 1024, 1)
        sources["memory_gib"] = tool
    count = len(lines)
    return Profile(
        schema_version=1,
        name=LOCAL,
        kind=ProfileKind.GPU,
        device=name,
        compute_capability=capability,
        memory_gib=memory_gib,
        sources=sources,
        notes=f"{count} GPUs are present; the first is described." if count > 1 else "",
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
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


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
