"""Describe the GPU and its state, and try whether it computes at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_checks.checks import COMPUTES_NOTHING, Check, Found
from gpu_checks.room import Room
from llmc.errors import ResourceError
from llmc.gpu import driver_version, require_gpu
from llmc.runtime.product import PRODUCT_BOUND, product_error
from llmc.validate.energy import open_nvml


def describe_gpu() -> str:
    """Return the name of CUDA's first GPU, its capability, and the release of CUDA of its driver.

    Raises:
        ResourceError: A GPU, or a driver that works, is missing.
    """
    gpu, version = require_gpu(), driver_version()
    driver = "" if version is None else f", driver for CUDA {version[0]}.{version[1]}"
    return f"{gpu.name}, compute capability {gpu.capability}{driver}"


def check_environment(room: Room, check: Check) -> Found:
    """Describe the GPU: name, driver, memory, clocks, and what PyTorch has of CUDA."""
    import torch

    gpu = require_gpu()
    figures: dict[str, Any] = {
        "gpu": describe_gpu(),
        "uuid": gpu.uuid,
        "memory_bytes": gpu.memory_bytes,
        "torch_cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }
    return Found({**figures, **_ask_nvml(gpu.uuid)})


def _ask_nvml(uuid: str) -> dict[str, Any]:
    try:
        nvml, handle = open_nvml(uuid)
    except ResourceError as error:
        return {"nvml_not_measured": error.fact}
    questions: dict[str, Callable[[], Any]] = {
        "driver": nvml.nvmlSystemGetDriverVersion,
        "memory_free_bytes": lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).free),
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "sm_clock_limit_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    }
    figures: dict[str, Any] = {}
    for name, question in questions.items():
        try:
            figures[name] = question()
        except nvml.NVMLError as error:
            figures[f"{name}_not_measured"] = str(error)
    return figures


def check_probe(room: Room, check: Check) -> Found:
    """Multiply two small matrices on the GPU; no figure of a device that cannot is believed.

    Raises:
        ResourceError: CUDA cannot be used, or the product is wrong.
    """
    error = product_error()
    if not error <= PRODUCT_BOUND:
        raise ResourceError(
            f"{COMPUTES_NOTHING}: a product of two matrices is off by {error:.3g} on {require_gpu().name}"
        )
    return Found({"largest_error": error})
