"""Bases of the records that are read from and written to files."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen record that takes no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Strict(Record):
    """A record that converts no types either."""

    model_config = ConfigDict(strict=True)
