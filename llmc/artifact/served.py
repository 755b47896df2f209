"""Record what a server did with an artifact."""

from enum import StrEnum

from pydantic import Field

from llmc.artifact.verdict import Figure
from llmc.records import Strict


class Deed(StrEnum):
    """What a server did with an artifact."""

    EXECUTED = "executed"
    READ = "read, not executed"
    FAILED = "failed"
    NOT_ASKED = "not measured"


class ServerRecord(Strict):
    """One server and one artifact.

    Args:
        name: Name of the server.
        version: Its version; None if it was not asked.
        deed: What it did.
        where: The device that it computed on.
        dtype: Type of its activations.
        taken: Number of the artifact's tensors that it took.
        skipped: Number of tensors that it did not take, and of its parameters that none filled.
        figures: Its metrics by their names.
    """

    name: str
    version: str | None
    deed: Deed
    where: str = ""
    dtype: str = ""
    taken: int | None = None
    skipped: int | None = None
    figures: dict[str, Figure] = Field(default_factory=dict)

    @property
    def line(self) -> str:
        """The facts in one line: version, what it did and where, and the tensors that it took."""
        tensors = "" if self.taken is None else f"{self.taken} tensors taken, {self.skipped} skipped"
        facts = (self.version, self.deed.value, self.where, self.dtype, tensors)
        return ", ".join(fact for fact in facts if fact)
