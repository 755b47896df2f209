"""Define the types that products are computed in, and the settings of TensorRT engines, in a target."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmc.config.base import CalibrationText, Rule
from llmc.records import Strict


class WeightFormat(StrEnum):
    """The type of a quantized matrix in which products are computed; all of them are symmetric."""

    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


#: How activations can be quantized for each format of weights.
_ACTIVATIONS: dict[WeightFormat, tuple[str, ...]] = {
    WeightFormat.INT8: ("static", "dynamic"),
    WeightFormat.INT4: (),
    WeightFormat.FP8: ("static", "dynamic"),
    WeightFormat.NVFP4: ("dynamic",),
}


class EngineScheme(Strict):
    """The storage of one matrix, and the type in which its products are computed.

    Args:
        format: int8 and fp8 have a scale per output feature; int4 one per block; nvfp4 one per block of 16
            in fp8, times one per tensor.
        block_size: Number of input features that share a scale; only for int4, where it is required.
        activations: `float`: products are computed in the type of the activations. `static`: activations are
            also stored in `format`, by one scale each that calibration text decides (int8 and fp8).
            `dynamic`: activations are stored in `format` at run time, nvfp4 by block within one scale that
            calibration text decides, int8 and fp8 by token (checkpoints only).
        scale_per: Weights that share a scale of fp8: those of an `output` feature, or of the whole `tensor`
            (checkpoints only).
    """

    format: Annotated[WeightFormat, Field(strict=False)]
    block_size: Literal[16, 32, 64, 128] | None = None
    activations: Literal["float", "static", "dynamic"] = "float"
    scale_per: Literal["output", "tensor"] = "output"

    @property
    def needs_range(self) -> bool:
        """Whether calibration text decides a scale of the activations."""
        return self.activations == "static" or (
            self.activations == "dynamic" and self.format is WeightFormat.NVFP4
        )

    @property
    def bits(self) -> int:
        """The bits per stored value."""
        return 4 if self.format in (WeightFormat.INT4, WeightFormat.NVFP4) else 8

    @property
    def symmetric(self) -> bool:
        """The symmetry of the codes: always True, since these types have no zero points."""
        return True

    @model_validator(mode="after")
    def _blocks(self) -> "EngineScheme":
        if (self.format is WeightFormat.INT4) != (self.block_size is not None):
            raise ValueError("block_size is required for int4, and not allowed for other formats")
        accepted = {"float", *_ACTIVATIONS[self.format]}
        if self.activations not in accepted:
            options = " or ".join(sorted(accepted))
            raise ValueError(f"{self.format.value} supports activations {options}, not {self.activations}")
        if self.scale_per == "tensor" and self.format is not WeightFormat.FP8:
            raise ValueError(f"a scale per tensor is for fp8, not {self.format.value}")
        return self


EngineRule = Rule[EngineScheme]


class Span(Strict):
    """The sizes of one dynamic dimension: the least, the one to optimize for, and the largest."""

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


class TypedWeights(Strict):
    """The types in which products are computed, by rules.

    Args:
        weights: Rules for the matrices to quantize.
        calibration: Text for quantized activations; None if no rule needs any.
        least_activation_db: Activations whose signal-to-noise ratio as quantized on that text is lower stay
            in float, and so do the products that read them; None keeps none in float.
    """

    weights: tuple[EngineRule, ...] = ()
    calibration: CalibrationText | None = None
    least_activation_db: float | None = None

    @property
    def quantizes_activations(self) -> bool:
        """Whether a rule quantizes activations."""
        return any(rule.scheme is not None and rule.scheme.activations != "float" for rule in self.weights)


class Engine(TypedWeights):
    """The sizes and types for which a TensorRT engine is built.

    Args:
        kv_capacity: Slots of the KV cache, which limit the length of prompt and answer together.
        batch: Rows of a batch, in prefill and decode.
        prefill: New tokens of a row in one prefill step; decode always has one.
    """

    kv_capacity: Annotated[int, Field(ge=2)]
    batch: Span
    prefill: Span

    @model_validator(mode="after")
    def _fits(self) -> "Engine":
        for scheme in (rule.scheme for rule in self.weights if rule.scheme is not None):
            if scheme.activations == "dynamic" and not scheme.needs_range:
                raise ValueError(
                    f"TensorRT scales activations in {scheme.format.value} by calibration text, not by "
                    "token: use activations static"
                )
            if scheme.scale_per == "tensor":
                raise ValueError("an engine has a scale of fp8 per output feature, not per tensor")
        if self.quantizes_activations != (self.calibration is not None):
            raise ValueError("give calibration if and only if a rule quantizes activations")
        if self.prefill.most > self.kv_capacity:
            raise ValueError(
                f"prefill of {self.prefill.most} tokens does not fit kv_capacity {self.kv_capacity}"
            )
        return self
