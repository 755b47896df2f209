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

    @property
    def has_cache_scales(self) -> bool:
        """Whether servers read scales of a KV cache in this format."""
        return self in (CheckpointFormat.COMPRESSED_TENSORS, CheckpointFormat.MODELOPT)


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
        if self.calibration is None and any(scheme.needs_range for scheme in schemes):
            raise ValueError("static activations and those of nvfp4 need calibration")
        return self
