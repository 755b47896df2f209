"""Define what a check of servers.py is, and what all checks are run with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "onnxruntime-gpu")

Figures = dict[str, Any]


class MissingError(Exception):
    """Something that a check needs is not installed here."""


@dataclass(frozen=True)
class Settings:
    """What all checks are run with.

    Args:
        cache: Folder for checkpoints, environments and artifacts; an absolute path.
        iters: Steps of AutoRound for each layer.
        rounds: Builds of each tool that are timed.
        peers: Interpreter with llm-compressor and AutoRound; None for an environment in `cache`.
        modelopt: Interpreter with nvidia-modelopt; None to leave out this reader.
        edgellm: Interpreter with tensorrt-edgellm; None to leave out this reader.
    """

    cache: Path
    iters: int
    rounds: int
    peers: Path | None
    modelopt: Path | None
    edgellm: Path | None


def always_met(_: Figures) -> str | None:
    """Return no reason to fail: a figure that is only reported."""
    return None


@dataclass(frozen=True)
class Check:
    """A check.

    Args:
        name: Its kind, and what it is of behind slashes.
        goal: What is to be seen, for the table.
        run: Measures the figures. It raises MissingError where something is not installed.
        missed: Returns why the figures miss the goal, or None.
        settles: What the figures depend on besides the code and the releases.
    """

    name: str
    goal: str
    run: Callable[[Settings], Figures]
    missed: Callable[[Figures], str | None] = always_met
    settles: Callable[[Settings], str] | None = None

    def matches(self, names: tuple[str, ...]) -> bool:
        """Return whether it is one of `names`, which may leave out what stands behind a slash."""
        return any(self.name == name or self.name.startswith(f"{name}/") for name in names)

    def facts(self, settings: Settings) -> str | None:
        """Return what its figures depend on besides the code and the releases."""
        return None if self.settles is None else self.settles(settings)


def versions() -> dict[str, str]:
    """Return the releases that figures depend on."""
    return {name: version(name) for name in PACKAGES}
