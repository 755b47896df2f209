"""Import the runtimes that execute graphs, with their telemetry turned off."""

from typing import Any

from llmc.errors import ResourceError


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
