"""What the parts of a target share."""

from enum import StrEnum
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, Field

from llmc.records import Strict


class WeightRole(StrEnum):
    """What a matrix is for, which decides its bits.

    RESIDUAL is a projection whose result is added to the residual stream (of attention's output, down
    in the MLP); ROUTER chooses experts, EXPERTS are the stacked matrices of a layer of them; LINEAR is
    any other linear layer.
    """

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    RESIDUAL = "residual"
    ROUTER = "router"
    EXPERTS = "experts"
    LINEAR = "linear"


Scheme = TypeVar("Scheme", bound=BaseModel)


class Rule(Strict, Generic[Scheme]):
    """The first rule whose role and name pattern fit decides; `scheme: null` leaves it in float."""

    role: Annotated[WeightRole, Field(strict=False)] | None = None
    match: str = "*"
    scheme: Scheme | None


class CalibrationText(Strict):
    """How much of the text that ships for calibration the model is run on.

    Args:
        window_tokens: Tokens of one window; windows do not overlap.
        max_windows: Most windows; fewer if the text has no more.
    """

    window_tokens: Annotated[int, Field(ge=16)]
    max_windows: Annotated[int, Field(ge=1)]
