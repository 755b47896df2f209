"""Record the facts of a TensorRT engine when it is built, since none can be read back without its GPU."""

from typing import Literal

from pydantic import Field

from llmc.records import Strict


class EnginePhase(Strict):
    """The facts of one optimization profile of an engine.

    Args:
        name: Prefill, or decode with one new token per row.
        shapes: Least, typical and largest shape of every input with a dynamic dimension.
        layers: Number of kernels and other steps of the engine; None if its layers could not be read.
        layers_per_decoder_layer: Number of those in which the middle decoder layer takes part; None likewise.
        fused_attention: Number of attention layers of the model that one fused kernel computes; None if that
            is in doubt.
        scratch_bytes: Memory besides weights, inputs and outputs; None if TensorRT does not state it.
    """

    name: Literal["prefill", "decode"]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    layers: int | None
    layers_per_decoder_layer: int | None
    fused_attention: int | None
    scratch_bytes: int | None


class EngineRecord(Strict):
    """The facts of one engine of an artifact, built or to be built on its GPU.

    Args:
        file: Its file in the artifact; None while it is pending.
        library: The Python module that builds and runs it.
        version: Release of the library; None while it is pending. An engine runs only under that release.
        sms: Compute capabilities for which it has kernels, by TensorRT's names.
        profiles: Hardware profiles that it serves.
        weight_bytes: Bytes of its weights on the device.
        quantized_products: Number of products that it computes from a quantized weight directly, by type.
        sparse_weights: Whether the builder was allowed kernels for 2:4 sparse weights; it does not report
            which ones it used.
        phases: Its optimization profiles, in the engine's order.
        doubt: Why its attention may not be fused or its products not quantized; None if its layers show that
            they are. Only TensorRT's engines can be in doubt.
        context: ONNX model around it for ONNX Runtime's provider of TensorRT-RTX, if that accepts the engine.
            Experimental: no such model was ever executed.
    """

    file: str | None
    library: Literal["tensorrt_rtx", "tensorrt"]
    version: str | None
    sms: tuple[str, ...]
    profiles: tuple[str, ...]
    weight_bytes: int | None = None
    quantized_products: dict[str, int] = Field(default_factory=dict)
    sparse_weights: bool = False
    phases: tuple[EnginePhase, ...] = ()
    doubt: str | None = None
    context: str | None = None
