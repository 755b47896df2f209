"""What is recorded of a TensorRT engine when it is built, since none can be read back without its GPU."""

from typing import Literal

from pydantic import Field

from llmc.records import Strict


class EnginePhase(Strict):
    """One optimization profile of an engine.

    Args:
        name: Prefill, or decode with one new token a row.
        shapes: Least, typical and largest shape of every input with a dynamic dimension.
        layers: Kernels and other steps of the engine.
        layers_per_decoder_layer: Those that the decoder layer in the middle takes part in.
        fused_attention: Attention layers of the model that one fused kernel computes.
        scratch_bytes: Memory besides weights, inputs and outputs.
    """

    name: Literal["prefill", "decode"]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    layers: int
    layers_per_decoder_layer: int
    fused_attention: int
    scratch_bytes: int


class EngineRecord(Strict):
    """One engine of an artifact, built or to be built on its GPU.

    Args:
        file: Its file in the artifact; None while it is pending.
        library: The Python module that builds and runs it.
        version: Release of the library; None while it is pending. An engine runs under that release alone.
        sms: Compute capabilities that it holds kernels for, by TensorRT's names.
        profiles: Hardware profiles that it serves.
        weight_bytes: Weights that it holds on the device.
        quantized_products: Products that the engine computes from a quantized weight directly, by its type.
        sparse_weights: Whether the builder was allowed kernels for 2:4 sparse weights; which it took, it does
            not say.
        phases: Its optimization profiles, in the engine's order.
        context: ONNX model around it for ONNX Runtime's provider of TensorRT-RTX, if that takes the engine.
            Experimental: none was ever loaded.
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
    context: str | None = None
