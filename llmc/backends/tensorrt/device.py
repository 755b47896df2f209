"""Require that CUDA's first device is one that an engine is for."""

from collections.abc import Sequence

from llmc.backends.tensorrt.support import sm_of
from llmc.errors import ResourceError
from llmc.gpu import require_gpu, selecting_hint


def require_device(device: str, capability: str, sms: Sequence[str], engine: str) -> None:
    """Require one of several compute capabilities of CUDA's first device.

    Args:
        device: Its name.
        capability: Its compute capability, such as "9.0".
        sms: Compute capabilities of the engine, by TensorRT's names.
        engine: The engine's file.

    Raises:
        ResourceError: It has another one; the hint names a GPU of this machine that would do.
    """
    own = sm_of(capability)
    if own not in sms:
        raise ResourceError(
            f"CUDA's first device is {device} ({own}), but {engine} is for {', '.join(sms)}",
            hint=selecting_hint(lambda gpu: sm_of(gpu.capability) in sms)
            or "CUDA_VISIBLE_DEVICES names the GPU to use, by its UUID from nvidia-smi -L",
        )


def require_current_device(sms: Sequence[str], engine: str) -> None:
    """Require that TensorRT, which builds on CUDA's first device and for it, would build this engine.

    Raises:
        ResourceError: CUDA gives this process no GPU, or first one of another compute capability.
    """
    gpu = require_gpu()
    require_device(gpu.name, gpu.capability, sms, engine)
