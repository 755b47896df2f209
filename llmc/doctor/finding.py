"""Define the result of one check."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["ok", "absent", "broken", "problem"]


class Finding(BaseModel):
    """The result of one check.

    `absent` is optional and missing, `broken` is optional and there, but does not work; only `problem`
    prevents a CPU build.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    status: Status
    detail: str
    hint: str | None = None
