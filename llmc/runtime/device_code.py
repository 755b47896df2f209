"""Tell which GPUs the kernels inside a CUDA library can run on.

A library holds machine code for some architectures, and may hold PTX, from which the driver compiles for
newer ones. The published libraries of ONNX Runtime hold no PTX, so that a GPU without machine code of its own
kind fails at the first kernel (cudaErrorNoKernelImageForDevice).
"""

import mmap
import struct
from collections.abc import Iterable
from pathlib import Path

#: Release of onnxruntime-gpu that `PUBLISHED` describes.
RELEASE = "1.31.1"

#: What the wheels of `RELEASE` hold machine code for, by platform. For Linux on x86-64, a test reads it from
#: the installed wheel; for the others it is as stated in microsoft/onnxruntime, pull request 31992.
PUBLISHED: dict[str, tuple[str, ...]] = {
    "Linux on x86-64": ("7.5", "8.0", "8.6", "8.9", "9.0a", "12.0a"),
    "Linux on AArch64": ("8.9", "9.0a", "12.0a", "12.1a"),
    "Windows": ("7.5", "8.0", "8.6", "8.9", "12.0a"),
}

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")  # magic, version, size of the header, size of the entries
_ENTRY = struct.Struct("<HHIQ12xI8xQ")  # kind, version, sizes of header and code, architecture, flags
_PTX, _MACHINE_CODE = 1, 2
#: Flag of code for one architecture alone: set in ONNX Runtime's code for sm_90a and sm_120a, not in
#: onnxruntime-genai's for sm_90 and sm_120. The format is not documented.
_ALONE = 1 << 20


def runs_on(code: Iterable[str], capability: str) -> bool:
    """Return whether a GPU runs one of several kinds of code.

    Machine code runs on GPUs of its major capability whose minor one is not lower; with the suffix `a`, on no
    other than its own. PTX runs on every GPU that is not older.

    Args:
        code: Capabilities, such as "8.9" or "9.0a" for machine code and "ptx 9.0" for PTX.
        capability: Compute capability of the GPU, such as "8.9".
    """
    own = _numbers(capability)
    for each in code:
        if each.startswith("ptx "):
            fits = own >= _numbers(each.removeprefix("ptx "))
        elif each.endswith("a"):
            fits = own == _numbers(each.removesuffix("a"))
        else:
            major, minor = _numbers(each)
            fits = own[0] == major and own[1] >= minor
        if fits:
            return True
    return False


def published_for(capability: str) -> tuple[str, ...]:
    """Return the platforms whose wheel of `RELEASE` has code for a GPU; empty if none has."""
    return tuple(platform for platform, code in PUBLISHED.items() if runs_on(code, capability))


def published_capabilities() -> tuple[str, ...]:
    """Return the capabilities that a wheel of `RELEASE` has code for, ascending."""
    every = {each.removesuffix("a") for code in PUBLISHED.values() for each in code}
    return tuple(sorted(every, key=_numbers))


def read_device_code(library: Path) -> tuple[str, ...]:
    """Read from the fatbinary headers in a library what it holds code for, as `runs_on` takes it; ascending.

    Returns:
        Empty if no header is recognised.
    """
    found: set[tuple[int, bool, int]] = set()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_MAGIC)
        while at >= 0:
            at = data.find(_MAGIC, _read_entries(data, at, found))
    return tuple(
        f"{'ptx ' if kind == _PTX else ''}{number // 10}.{number % 10}{'a' if alone else ''}"
        for number, alone, kind in sorted(found)
    )


def _read_entries(data: mmap.mmap, start: int, found: set[tuple[int, bool, int]]) -> int:
    """Add the entries after the header at `start` to `found`; return where to look for the next header."""
    if start + _HEADER.size > len(data):
        return len(data)
    header: int
    length: int
    _, _, header, length = _HEADER.unpack_from(data, start)
    at, end = start + header, start + header + length
    if header != _HEADER.size or end > len(data):
        return start + len(_MAGIC)
    while at + _ENTRY.size <= end:
        kind, _, header, size, architecture, flags = _ENTRY.unpack_from(data, at)
        if kind in (_PTX, _MACHINE_CODE):
            found.add((architecture, bool(flags & _ALONE), kind))
        if header < _ENTRY.size:
            break
        at += header + size
    return end


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
