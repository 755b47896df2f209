"""Define the bases of the records that are read from and written to files."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """The base of frozen records that accept no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Strict(Record):
    """The base of records that do not convert types either."""

    model_config = ConfigDict(strict=True)
