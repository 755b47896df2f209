"""Which versions of the tools a build ran with."""

import platform
from importlib.metadata import PackageNotFoundError, version

#: Distributions that shape the bytes of an artifact or run it. Alternatives that exclude each
#: other, such as onnxruntime and onnxruntime-gpu, are all listed: the installed ones are recorded.
_DISTRIBUTIONS = (
    "gguf",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "onnxruntime-gpu",
    "onnxscript",
    "safetensors",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "transformers",
)


def tool_versions() -> dict[str, str]:
    """Version of Python and of every installed distribution that matters, by name; imports none.

    The machine's architecture is among them as `machine`: the last digits of sums depend on it.
    """
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
