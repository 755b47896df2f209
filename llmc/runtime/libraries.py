"""Import the runtimes that execute graphs, with their telemetry turned off, and load what CUDA needs."""

import ctypes
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from llmc.errors import ResourceError
from llmc.gpu import Gpu, driver_version, is_missing_library, require_gpu, selecting_hint
from llmc.runtime.device_code import read_device_code, runs_on

#: Name of ONNX Runtime's execution provider for NVIDIA GPUs.
CUDA_PROVIDER = "CUDAExecutionProvider"

#: Entries of a session on CUDA. Weights are allocated one by one: from the arena, which grows by powers of
#: two, they would take up to twice their size.
CUDA_ENTRIES = {"session.use_device_allocator_for_initializers": "1"}

#: The CUDA libraries that ONNX Runtime and onnxruntime-genai need, those that others depend on first: their
#: names on Linux and on Windows, and the distribution that brings them.
LIBRARIES: tuple[tuple[str, str, str], ...] = (
    ("libcudart.so.13", "cudart64_13.dll", "nvidia-cuda-runtime"),
    ("libcublasLt.so.13", "cublasLt64_13.dll", "nvidia-cublas"),
    ("libcublas.so.13", "cublas64_13.dll", "nvidia-cublas"),
    ("libcurand.so.10", "curand64_10.dll", "nvidia-curand"),
    ("libcufft.so.12", "cufft64_12.dll", "nvidia-cufft"),
)
#: The release of CUDA whose libraries these are, and the first driver for it.
CUDA_RELEASE, FIRST_DRIVER = 13, 580


class MissingLibraryError(ResourceError):
    """Raised if a CUDA library is found nowhere (exit code 4)."""


def load_onnxruntime() -> Any:
    """Import the module onnxruntime.

    Raises:
        ResourceError: It cannot be imported.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ResourceError(
            f"onnxruntime, which executes graphs, cannot be imported: {error}",
            hint="pip install onnxruntime-gpu (x86-64) or onnxruntime (elsewhere)",
        ) from error
    ort.disable_telemetry_events()
    return ort


def load_genai() -> Any:
    """Import the module onnxruntime_genai.

    Raises:
        ResourceError: It cannot be imported.
    """
    try:
        import onnxruntime_genai as og
    except ImportError as error:
        raise ResourceError(
            f"onnxruntime-genai, which runs artifacts, cannot be imported: {error}",
            hint="pip install onnxruntime-genai-cuda (x86-64) or onnxruntime-genai (elsewhere)",
        ) from error
    og.disable_telemetry_events()
    return og


def require_cuda() -> Gpu:
    """Load the CUDA libraries for ONNX Runtime and onnxruntime-genai, and return the GPU that they will use.

    Libraries on LD_LIBRARY_PATH come first, then NVIDIA's distributions', then the system's. Nothing is
    written to standard output. Call it before a CUDA session is opened.

    Raises:
        ResourceError: A driver or GPU is missing, the driver is too old, a library is missing, or the
            installed onnxruntime has no CUDA provider or no code for the GPU.
    """
    ort = load_onnxruntime()
    gpu = require_gpu()
    require_driver()
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise ResourceError(
            f"the installed onnxruntime {ort.__version__} has no provider for CUDA",
            hint="pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu",
        )
    require_device_code(gpu)
    for name, distribution in library_names():
        load_library_of(name, distribution)
    _load_cudnn()
    return gpu


def require_cuda_for(artifact: Path) -> Gpu:
    """Do what `require_cuda` does, with errors that name the artifact that is built for CUDA."""
    try:
        return require_cuda()
    except ResourceError as error:
        raise ResourceError(f"{artifact} is built for CUDA: {error.fact}", hint=error.hint) from error


def require_driver() -> None:
    """Require a driver that is new enough for the CUDA libraries.

    Raises:
        ResourceError: It is not.
    """
    version = driver_version()
    if version is not None and version[0] < CUDA_RELEASE:
        raise ResourceError(
            f"NVIDIA's driver supports CUDA {version[0]}.{version[1]}, but onnxruntime-gpu needs "
            f"CUDA {CUDA_RELEASE}",
            hint=f"install driver {FIRST_DRIVER} or newer",
        )


def require_device_code(gpu: Gpu) -> None:
    """Require that the installed ONNX Runtime has code for a GPU.

    Raises:
        ResourceError: It has none.
    """
    code = _device_code()
    if not code or runs_on(code, gpu.capability):
        return
    raise ResourceError(
        f"the installed onnxruntime-gpu has no code for {gpu.name} (compute capability {gpu.capability}), "
        f"only for {', '.join(each.removesuffix('a') for each in code)}",
        hint=selecting_hint(lambda each: runs_on(code, each.capability))
        or "build with a target tensorrt-* for this GPU: llmc targets",
    )


def has_device_code(capability: str) -> bool | None:
    """Return whether the installed ONNX Runtime has code for a GPU; None if it has no CUDA kernels at all."""
    code = _device_code()
    return runs_on(code, capability) if code else None


@cache
def _device_code() -> tuple[str, ...]:
    library = provider_library()
    return read_device_code(library) if library.is_file() else ()


def provider_library() -> Path:
    """Return the path of the library with ONNX Runtime's CUDA kernels; plain onnxruntime has none."""
    spec = importlib.util.find_spec("onnxruntime")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    windows = sys.platform == "win32"
    name = "onnxruntime_providers_cuda.dll" if windows else "libonnxruntime_providers_cuda.so"
    return folder / "capi" / name


def library_names() -> tuple[tuple[str, str], ...]:
    """Return the name of each CUDA library on this system, with the distribution that brings it."""
    windows = sys.platform == "win32"
    return tuple((dll if windows else so, distribution) for so, dll, distribution in LIBRARIES)


def load_library_of(name: str, distribution: str) -> None:
    """Load a CUDA library, so that libraries loaded later find it by its name.

    Raises:
        MissingLibraryError: It is found nowhere.
        ResourceError: It does not load.
    """
    if _is_loaded(name):
        return
    file = next((folder / name for folder in _library_folders() if (folder / name).is_file()), None)
    try:
        ctypes.CDLL(name if file is None else str(file))
    except OSError as error:
        missing = file is None and is_missing_library(error, name)
        kind = MissingLibraryError if missing else ResourceError
        raise kind(
            f"{name}, which onnxruntime needs for CUDA, "
            + ("is not installed" if missing else f"does not load: {error}"),
            hint=f"pip install '{distribution}', or 'llmc[gpu]', which brings all of them",
        ) from error


def _is_loaded(name: str) -> bool:
    """Return whether this process has loaded a library of this name, from whatever folder."""
    if sys.platform == "win32":
        return False  # there, loading it again by any path finds the loaded one by its name
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return True


def _load_cudnn() -> None:
    """Load cuDNN from NVIDIA's distribution if it is there.

    ONNX Runtime looks for it by its name alone, when an operator needs it, which few graphs have.

    Raises:
        ResourceError: It does not load.
    """
    windows = sys.platform == "win32"
    parts = ("bin", "cudnn64_9.dll") if windows else ("lib", "libcudnn.so.9")
    files = [Path(place, "cudnn", *parts) for place in _places()]
    found = next(filter(Path.is_file, files), None)
    if found is None or _is_loaded(parts[-1]):
        return
    try:
        ctypes.CDLL(str(found))
    except OSError as error:
        raise ResourceError(
            f"{found.name} of the installed cuDNN does not load: {error}",
            hint="pip install --force-reinstall --no-deps nvidia-cudnn-cu13, or uninstall it: few models "
            "need it",
        ) from error


def _places() -> list[str]:
    """Return the folders in which NVIDIA's distributions are installed."""
    spec = importlib.util.find_spec("nvidia")
    return [] if spec is None else list(spec.submodule_search_locations or [])


def _library_folders() -> list[Path]:
    """Return the folders to look in before the system's: the user's, then NVIDIA's distributions'."""
    parts = ("bin", "x86_64") if sys.platform == "win32" else ("lib",)
    own = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    return [Path(each) for each in own if each] + [
        Path(place, f"cu{CUDA_RELEASE}", *parts) for place in _places()
    ]
