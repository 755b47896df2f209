"""Wrap device memory, a stream and graphs of the CUDA runtime, through cuda-bindings.

cuda-bindings includes the CUDA runtime and looks for the driver at the first call of a function: it can be
imported on any machine, and the error code of each function tells what is missing. Resources created here are
freed with their Python objects.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.errors import LlmcError, ResourceError

_HINTS = {
    "cudaErrorInsufficientDriver": "install NVIDIA's driver, or a newer one",
    "cudaErrorCallRequiresNewerDriver": "install a newer driver of NVIDIA",
    "cudaErrorNoDevice": "run it on a machine with an NVIDIA GPU",
    "cudaErrorDevicesUnavailable": "another process holds the GPU for itself",
    "cudaErrorMemoryAllocation": "copy the target and set a smaller kv_capacity or batch",
}


def load_runtime() -> Any:
    """Import the module `cuda.bindings.runtime`.

    Raises:
        ResourceError: cuda-bindings is not installed, or does not load.
    """
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError) as error:
        raise ResourceError(
            f"cuda-bindings, which executes engines, cannot be imported: {error}",
            hint="pip install 'llmc[gpu]'",
        ) from error
    return runtime


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the CUDA runtime; return its results besides the error code, None if there are none.

    Raises:
        ResourceError: Its error code is not success; the error names the code.
    """
    code, *values = function(*arguments)
    if code:
        name = function.__name__
        description = _describe(code)
        raise ResourceError(f"{name} of CUDA fails: {description}", hint=_HINTS.get(code.name))
    return values[0] if values else None


def _describe(code: Any) -> str:
    _, text = load_runtime().cudaGetErrorString(code)
    return f"{text.decode()} ({code.name}, {int(code)})"


def _freed_with(owner: object, function: Callable[..., Any], handle: int) -> None:
    """Have `function` free `handle` when `owner` is freed; at its end, a process frees everything anyway."""
    weakref.finalize(owner, function, handle).atexit = False


class DeviceBuffer:
    """Device memory.

    Args:
        size: Size in bytes.

    Raises:
        ResourceError: This machine has no CUDA device, or the device lacks memory.
    """

    def __init__(self, size: int) -> None:
        runtime = load_runtime()
        self.size = size
        self.address = int(call(runtime.cudaMalloc, size))
        _freed_with(self, runtime.cudaFree, self.address)


class CapturedGraph:
    """Work captured from a stream, to be launched as one unit."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        _freed_with(self, load_runtime().cudaGraphExecDestroy, handle)


class Stream:
    """A stream of the first device, and the work queued on it.

    Afterwards `device` and `capability` identify the device, and `driver` is the release of CUDA up to which
    the driver supports it, such as "13000".

    Raises:
        ResourceError: cuda-bindings, the driver or a device is missing.
    """

    def __init__(self) -> None:
        self._runtime = load_runtime()
        flags = self._runtime.cudaStreamNonBlocking
        properties = call(self._runtime.cudaGetDeviceProperties, 0)
        self.device = properties.name.decode()
        self.capability = f"{properties.major}.{properties.minor}"
        self.driver = str(call(self._runtime.cudaDriverGetVersion))
        self.handle = int(call(self._runtime.cudaStreamCreateWithFlags, flags))
        _freed_with(self, self._runtime.cudaStreamDestroy, self.handle)

    def write(self, buffer: DeviceBuffer, values: Array) -> None:
        """Copy a contiguous array to the beginning of `buffer`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        source = values.ctypes.data
        call(self._runtime.cudaMemcpyAsync, buffer.address, source, values.nbytes, kind, self.handle)

    def read(self, buffer: DeviceBuffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return the beginning of `buffer`, after all earlier work on the stream is done."""
        values = np.empty(shape, dtype)
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        target = values.ctypes.data
        call(self._runtime.cudaMemcpyAsync, target, buffer.address, values.nbytes, kind, self.handle)
        self.synchronize()
        return values

    def clear(self, buffer: DeviceBuffer) -> None:
        """Set every byte of `buffer` to 0."""
        call(self._runtime.cudaMemsetAsync, buffer.address, 0, buffer.size, self.handle)

    def synchronize(self) -> None:
        """Wait until all work on the stream is done; its errors are raised here."""
        call(self._runtime.cudaStreamSynchronize, self.handle)

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """Capture what `work` queues on the stream as a graph, without executing it.

        Raises:
            ResourceError: CUDA cannot capture it.
            LlmcError: The error that `work` raises.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(self._runtime.cudaStreamBeginCapture, self.handle, mode)
        try:
            work()
        except LlmcError:
            self._runtime.cudaStreamEndCapture(self.handle)  # its error code matters less than `work`'s error
            raise
        graph = call(self._runtime.cudaStreamEndCapture, self.handle)
        try:
            return CapturedGraph(int(call(self._runtime.cudaGraphInstantiate, graph, 0)))
        finally:
            call(self._runtime.cudaGraphDestroy, graph)

    def launch(self, graph: CapturedGraph) -> None:
        """Queue the work of `graph` on the stream."""
        call(self._runtime.cudaGraphLaunch, graph.handle, self.handle)
