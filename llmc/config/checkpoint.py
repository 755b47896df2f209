"""Define the settings of a checkpoint for servers in a target: its format, and the types of its weights."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from llmc.config.engine import TypedWeights


class CheckpointFormat(StrEnum):
    """The format of quantized tensors and of `quantization_config`, named as transformers names it."""

    COMPRESSED_TENSORS = "compressed-tensors"
    GPTQ = "gptq"
    AWQ = "awq"
    MODELOPT = "modelopt"


class ServedCheckpoint(TypedWeights):
    """The form of a Hugging Face folder that servers load.

    Rules in `weights` are for types that servers multiply in (int8, fp8, nvfp4). Without them the section
    `quantize` of the target decides, whose weights are integers by block.

    Args:
        format: The format of the folder.
    """

    format: Annotated[CheckpointFormat, Field(strict=False)]

    @model_validator(mode="after")
    def _calibrated(self) -> "ServedCheckpoint":
        schemes = [rule.scheme for rule in self.weights if rule.scheme is not None]
        needs = any(scheme.needs_range for scheme in schemes)
        if needs and self.calibration is None:
            raise ValueError("static activations and those of nvfp4 need calibration")
        quantizes = any(scheme.activations != "float" for scheme in schemes)
        if self.calibration is not None and not (needs or quantizes):
            raise ValueError("calibration is for rules that quantize activations")
        return self
