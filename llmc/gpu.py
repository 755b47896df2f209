"""Ask NVIDIA's driver for the GPUs that CUDA gives to this process, in CUDA's order.

The driver decides by `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER` as they were at its first call.
nvidia-smi ignores both, and lists GPUs that this process cannot use. No CUDA library is needed.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.errors import ResourceError

#: CUresult of cuInit: there is no GPU, or CUDA_VISIBLE_DEVICES hides all of them.
_NO_DEVICE = 100
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute in cuda.h

#: What to do about other results of cuInit, by CUresult.
_HINTS = {
    34: "take the folder of CUDA's stub libraries off LD_LIBRARY_PATH",
    802: "nvidia-fabricmanager must run before CUDA is used on this machine: systemctl status it",
    803: "the driver was updated and its kernel module was not: restart the machine, or reload the module",
    804: "take the folder of the cuda-compat libraries off LD_LIBRARY_PATH, or install a newer driver",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it.

    Args:
        name: The driver's name of it, as nvidia-smi prints it, such as "NVIDIA H200".
        capability: CUDA compute capability, such as "9.0".
        memory_bytes: Its memory, or the host's if it has none of its own.
        uuid: Its name in CUDA_VISIBLE_DEVICES, such as "GPU-8a56a4c6-…".
        integrated: Whether it shares the memory of the host.
    """

    name: str
    capability: str
    memory_bytes: int
    uuid: str
    integrated: bool = False


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that this process can use, CUDA's first one first; none without a driver.

    Raises:
        ResourceError: There is a driver, but it does not work.
    """
    driver = _load_driver()
    if driver is None:
        return ()
    code = driver.cuInit(0)
    if code == _NO_DEVICE:
        return ()
    _check(driver, "cuInit", code)
    count = _ask_number(driver, "cuDeviceGetCount")
    return tuple(_describe(driver, ordinal) for ordinal in range(count))


def driver_version() -> tuple[int, int] | None:
    """Return the newest release of CUDA that the driver supports, such as (13, 0); None without a driver.

    Raises:
        ResourceError: There is a driver, but it does not answer.
    """
    driver = _load_driver()
    if driver is None:
        return None
    version = _ask_number(driver, "cuDriverGetVersion")
    return version // 1000, version % 1000 // 10


def require_gpu() -> Gpu:
    """Return the GPU that CUDA gives to this process first.

    Raises:
        ResourceError: A GPU, or a driver that works, is missing.
    """
    found = gpus()
    if found:
        return found[0]
    if _load_driver() is None:
        raise ResourceError(
            "this machine has no NVIDIA GPU, or no driver for it",
            hint=f"run it where nvidia-smi lists a GPU; CUDA looks for the driver as {_library()}",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        raise ResourceError(
            "NVIDIA's driver is installed, but finds no GPU",
            hint="run it where nvidia-smi lists a GPU; docker run needs --gpus all to hand one in",
        )
    raise ResourceError(
        f"CUDA_VISIBLE_DEVICES={visible!r} leaves no GPU visible to CUDA",
        hint="unset it, or name a GPU in it by its UUID from nvidia-smi -L",
    )


def selecting_hint(fits: Callable[[Gpu], bool]) -> str | None:
    """Return how to select a GPU that fits, among those visible besides the first; None if none does."""
    other = next((gpu for gpu in gpus()[1:] if fits(gpu)), None)
    if other is None:
        return None
    return f"CUDA_VISIBLE_DEVICES={other.uuid} selects the {other.name} of this machine"


def gpu_memory_in_use() -> int:
    """Return the bytes in use on the first GPU, by all processes, with CUDA's context of this one.

    Raises:
        ResourceError: A GPU is missing, or the driver does not work.
    """
    require_gpu()
    driver, context = _load_driver(), ctypes.c_void_p()
    device = _ask_number(driver, "cuDeviceGet", 0)
    retained = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)  # the context that runtimes use
    _check(driver, "cuDevicePrimaryCtxRetain", retained)
    _check(driver, "cuCtxSetCurrent", driver.cuCtxSetCurrent(context))
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _check(driver, "cuMemGetInfo", driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
    return total.value - free.value


def _library() -> str:
    return "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def _load_driver() -> Any:
    """Load the library of NVIDIA's driver; None if it is missing.

    Containers that were saved where a GPU was handed in keep an empty file of that name.
    """
    name = _library()
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        if is_missing_library(error, name) or "file too short" in str(error):
            return None
        raise ResourceError(
            f"the library of NVIDIA's driver does not load: {error}",
            hint="it must be the library that the driver installed, for this processor: see LD_LIBRARY_PATH",
        ) from error


def is_missing_library(error: OSError, name: str) -> bool:
    """Return whether the system found no library of this name, rather than one that it cannot load."""
    return f"{name}: cannot open shared object file" in str(error) or "Could not find module" in str(error)


def _check(driver: Any, function: str, code: int) -> None:
    if code == 0:
        return
    text = ctypes.c_char_p()
    known = driver.cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value is not None
    reason = f"{(text.value or b'').decode()} ({code})" if known else f"error {code}"
    raise ResourceError(
        f"NVIDIA's driver does not work: {function} fails with {reason}",
        hint=_HINTS.get(code, "nvidia-smi says whether the driver works; it may need a restart"),
    )


def _ask_number(driver: Any, function: str, *arguments: Any) -> int:
    number = ctypes.c_int()
    _check(driver, function, getattr(driver, function)(ctypes.byref(number), *arguments))
    return number.value


def _describe(driver: Any, ordinal: int) -> Gpu:
    device = _ask_number(driver, "cuDeviceGet", ordinal)
    major, minor, integrated = (
        _ask_number(driver, "cuDeviceGetAttribute", attribute, device)
        for attribute in (_MAJOR, _MINOR, _INTEGRATED)
    )
    name = ctypes.create_string_buffer(256)
    _check(driver, "cuDeviceGetName", driver.cuDeviceGetName(name, len(name), device))
    memory = ctypes.c_size_t()
    _check(driver, "cuDeviceTotalMem", driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
    uuid = (ctypes.c_ubyte * 16)()
    _check(driver, "cuDeviceGetUuid", driver.cuDeviceGetUuid(uuid, device))
    digits = bytes(uuid).hex()
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=f"{major}.{minor}",
        memory_bytes=memory.value,
        uuid=f"GPU-{'-'.join(parts)}",
        integrated=bool(integrated),
    )
