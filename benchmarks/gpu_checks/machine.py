"""Describe the GPU and its state, and try whether it computes at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpu_checks.checks import COMPUTES_NOTHING, Check, Found
from gpu_checks.room import Room
from llmc.errors import ResourceError
from llmc.gpu import driver_version, require_gpu
from llmc.runtime.libraries import CUDA_PROVIDER, load_onnxruntime, require_cuda

#: Largest difference of an element of the product of small integers, which float32 holds exactly.
_PROBE_BOUND = 1e-3


def describe_gpu() -> str:
    """Return the name of CUDA's first GPU, its capability, and the release of CUDA of its driver.

    Raises:
        ResourceError: There is no GPU, or no driver that works.
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


def open_nvml(uuid: str) -> tuple[Any, Any]:
    """Return the module pynvml, initialized, and the handle of a GPU.

    Raises:
        ResourceError: nvidia-ml-py, the library or the GPU is missing.
    """
    try:
        import pynvml
    except ImportError as error:
        raise ResourceError("nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        raise ResourceError(f"NVML does not answer: {error}") from error


def check_probe(room: Room, check: Check) -> Found:
    """Multiply two small matrices on the GPU; no figure of a device that cannot is believed.

    Raises:
        ResourceError: CUDA cannot be used, or the product is wrong.
    """
    gpu, error = require_cuda(), multiply()
    if not error <= _PROBE_BOUND:
        raise ResourceError(
            f"{COMPUTES_NOTHING}: a product of two matrices is off by {error:.3g} on {gpu.name}"
        )
    return Found({"largest_error": error})


def multiply() -> float:
    """Multiply two matrices of small integers in ONNX Runtime on the GPU; return the largest error.

    Raises:
        ResourceError: CUDA cannot be used.
    """
    require_cuda()
    random = np.random.default_rng(5)
    a, b = (random.integers(-4, 5, (32, 32)).astype(np.float32) for _ in range(2))
    with tempfile.TemporaryDirectory() as scratch:
        product = _multiply(_write_product(Path(scratch)), a, b)
    return float(np.abs(product - a @ b).max())


def _write_product(folder: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper

    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [32, 32])
        for name in ("a", "b", "product")
    }
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["product"])],
        "probe",
        [values["a"], values["b"]],
        [values["product"]],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = folder / "probe.onnx"
    onnx.save(model, str(path))
    return path


def _multiply(path: Path, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=[CUDA_PROVIDER])
    if CUDA_PROVIDER not in session.get_providers():
        raise ResourceError(f"onnxruntime {ort.__version__} does not load {CUDA_PROVIDER}")
    product: np.ndarray = session.run(None, {"a": a, "b": b})[0]
    return product
