"""What a target says of TensorRT engines."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmc.config.base import CalibrationText, Rule
from llmc.records import Strict


class WeightFormat(StrEnum):
    """Type of a quantized matrix inside of a TensorRT graph; all of them are symmetric."""

    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


class EngineScheme(Strict):
    """How one matrix of an engine is stored, and in which type its products are computed.

    Args:
        format: int8 and fp8 have a scale per output feature; int4 one per block; nvfp4 one per block of 16
            in fp8, times one per tensor.
        block_size: Input features that share a scale; int4 alone, where it is required.
        activations: `float`: products are computed in the graph's type. `static`: activations are stored in
            `format` too, by one scale each that calibration text decides (int8 and fp8). `dynamic`: in
            nvfp4, by block as they come.
    """

    format: Annotated[WeightFormat, Field(strict=False)]
    block_size: Literal[16, 32, 64, 128] | None = None
    activations: Literal["float", "static", "dynamic"] = "float"

    @property
    def bits(self) -> int:
        """Of one code."""
        return 4 if self.format in (WeightFormat.INT4, WeightFormat.NVFP4) else 8

    @property
    def symmetric(self) -> bool:
        """True: TensorRT takes no zero points."""
        return True

    @model_validator(mode="after")
    def _blocks(self) -> "EngineScheme":
        if (self.format is WeightFormat.INT4) != (self.block_size is not None):
            raise ValueError("block_size goes with int4, which needs it, and with no other format")
        taken = {
            "float",
            {WeightFormat.INT4: "float", WeightFormat.NVFP4: "dynamic"}.get(self.format, "static"),
        }
        if self.activations not in taken:
            options = " or ".join(sorted(taken))
            raise ValueError(f"{self.format.value} takes activations {options}, not {self.activations}")
        return self


EngineRule = Rule[EngineScheme]


class Span(Strict):
    """Sizes of one dynamic dimension: the least, the one to be fastest at, and the most."""

    least: Annotated[int, Field(ge=1)]
    typical: int
    most: int

    @model_validator(mode="after")
    def _ordered(self) -> "Span":
        if not self.least <= self.typical <= self.most:
            raise ValueError(
                f"least {self.least}, typical {self.typical} and most {self.most} must be in ascending order"
            )
        return self


class Engine(Strict):
    """What a TensorRT engine is built for.

    Args:
        kv_capacity: Slots of the KV cache, and so the longest prompt and answer together.
        batch: Rows of a batch, in prefill and decode.
        prefill: New tokens of a row in one prefill step; decode always takes one.
        weights: Which matrices are quantized, and how.
        calibration: Text for activations that are quantized; None if no rule quantizes any.
        least_activation_db: Activations whose signal-to-noise ratio on that text is lower as quantized stay
            in float, and so do the products that read them; None keeps none.
    """

    kv_capacity: Annotated[int, Field(ge=2)]
    batch: Span
    prefill: Span
    weights: tuple[EngineRule, ...] = ()
    calibration: CalibrationText | None = None
    least_activation_db: float | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Engine":
        wanted = any(rule.scheme is not None and rule.scheme.activations != "float" for rule in self.weights)
        if wanted != (self.calibration is not None):
            raise ValueError("give calibration if and only if a rule quantizes activations")
        if self.prefill.most > self.kv_capacity:
            raise ValueError(
                f"prefill of {self.prefill.most} tokens does not fit kv_capacity {self.kv_capacity}"
            )
        return self
