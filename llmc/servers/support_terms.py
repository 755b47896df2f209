"""Define the terms in which the table of servers says what each does with quantized checkpoints."""

from dataclasses import dataclass
from enum import StrEnum


class Runtime(StrEnum):
    """A program that loads Hugging Face folders."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"
    SGLANG = "sglang"
    TENSORRT_LLM = "tensorrt-llm"
    EDGELLM = "edgellm"
    LMDEPLOY = "lmdeploy"
    DEEPSPEED = "deepspeed"


class Status(StrEnum):
    """What a runtime does with the matrices of a scheme."""

    SERVED = "served"
    GPU_ONLY = "served on a GPU only"
    REFUSED = "refused"
    WRONG = "read wrongly"
    UNKNOWN = "not known"


class Evidence(StrEnum):
    """How it was found out."""

    RAN = "ran"
    LOADED = "loaded"
    SOURCE = "source"


class MatrixKind(StrEnum):
    """The codes of a matrix, and what becomes of activations."""

    INT4 = "int4 weights"
    INT8 = "int8 weights"
    INT8_DYNAMIC = "int8, activations by token"
    INT8_STATIC = "int8, static activations"
    FP8 = "fp8 weights"
    FP8_DYNAMIC = "fp8, activations by token"
    FP8_STATIC = "fp8, static activations"
    FP8_TENSOR = "fp8 by tensor, static activations"
    NVFP4 = "nvfp4"
    NVFP4_WEIGHTS = "nvfp4 weights"


@dataclass(frozen=True)
class SchemeSupport:
    """What a runtime does with one kind of matrices in one format.

    Args:
        where: Version of the runtime that was tried, or file of its repository that was read.
        reason: Why not, where the status is not `served`.
        groups: Sizes of groups that it takes; None for all. 0 stands for one group per output.
        zero_points: What it does with zero points.
        zero_points_reason: Why not.
        multiple: Number of which outputs and inputs of a matrix must be a multiple; where the status is
            `served`, only on a CPU.
    """

    status: Status
    evidence: Evidence
    where: str
    reason: str = ""
    groups: tuple[int, ...] | None = None
    zero_points: Status = Status.UNKNOWN
    zero_points_reason: str = ""
    multiple: int = 1


@dataclass(frozen=True)
class FolderSupport:
    """What a runtime does with several schemes in one folder of a format."""

    mixed: Status
    mixed_reason: str = ""


@dataclass(frozen=True)
class Treatment:
    """What a runtime does with a target, or with one of its schemes or matrices.

    Args:
        subject: The scheme, the matrix or the property that it is about.
        where: Evidence and its place; empty where no row says anything.
    """

    runtime: Runtime
    subject: str
    status: Status
    reason: str = ""
    where: str = ""

    @property
    def refuses(self) -> bool:
        """Whether the target must not be built for this runtime."""
        return self.status in (Status.REFUSED, Status.WRONG)
