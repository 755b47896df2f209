"""Define what a check is, and what it may use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_checks.room import Room
    from gpu_checks.subjects import Subject


#: The reason begins with this where no figure of a device is believed, since it multiplies matrices wrongly.
COMPUTES_NOTHING = "the device computes nothing"


@dataclass(frozen=True)
class Point:
    """Rows that run together, and tokens that each has before the timed steps."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"


@dataclass(frozen=True)
class Found:
    """The figures of a check.

    Args:
        figures: Values for JSON, by name.
        beyond: Which bound they miss; None if they hold all bounds, or have none.
    """

    figures: dict[str, Any]
    beyond: str | None = None


@dataclass(frozen=True)
class Settings:
    """The choices of the command line that checks depend on; picklable, for the process that runs them.

    Args:
        artifacts: Folder of checkpoints, artifacts and the original's logits.
        cuda: Whether there is a GPU to be measured.
        profile: Profile that artifacts are built for.
    """

    artifacts: Path
    cuda: bool
    profile: str


@dataclass(frozen=True)
class Check:
    """One check; its identifier is name/artifact/point, as far as it has them.

    Args:
        name: Name of the kind of check.
        run: Takes the room and the check. It raises ResourceError or UnsupportedError where a part is missing
            on this machine, and any other error where the check fails.
        subject: The artifact; None for a check of the machine.
        point: What is timed, for checks on speed.
        seconds: Forecast of its time, for the budget.
        gpu: Whether it says something only on a GPU.
        computed: Whether its figures come from the device's kernels.
        fresh: Whether it needs a GPU on which no other check has left anything.
    """

    name: str
    run: Callable[[Room, Check], Found] = field(repr=False)
    subject: Subject | None = None
    point: Point | None = None
    seconds: float = 5.0
    gpu: bool = True
    computed: bool = True
    fresh: bool = False

    @property
    def id(self) -> str:
        """Return the identifier."""
        parts = (self.name, self.subject and self.subject.name, self.point)
        return "/".join(str(part) for part in parts if part is not None)

    def matches(self, names: tuple[str, ...]) -> bool:
        """Return whether one of the names is a part of the identifier, or its beginning up to a slash."""
        return any(name in self.id.split("/") or f"{self.id}/".startswith(f"{name}/") for name in names)
