"""Define what the parts of a target share."""

from enum import StrEnum
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, Field

from llmc.records import Strict


class WeightRole(StrEnum):
    """The purpose of a matrix, which decides its bits.

    RESIDUAL is a projection whose result is added to the residual stream (attention's output projection, the
    MLP's down projection); ROUTER chooses experts, EXPERTS are the stacked matrices of a layer of them;
    LINEAR is any other linear layer.
    """

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    RESIDUAL = "residual"
    ROUTER = "router"
    EXPERTS = "experts"
    LINEAR = "linear"


Scheme = TypeVar("Scheme", bound=BaseModel)


class Rule(Strict, Generic[Scheme]):
    """The scheme of matching matrices: the first rule whose role and name match decides; null keeps float."""

    role: Annotated[WeightRole, Field(strict=False)] | None = None
    match: str = "*"
    scheme: Scheme | None


class CalibrationText(Strict):
    """The part of the calibration text that ships on which the model is run.

    Args:
        window_tokens: Number of tokens of one window; windows do not overlap.
        max_windows: Maximum number of windows; fewer if the text has no more.
    """

    window_tokens: Annotated[int, Field(ge=16)]
    max_windows: Annotated[int, Field(ge=1)]
