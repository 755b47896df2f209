"""Plan a tuning: resolve the names and values that a user gives to `llmc tune`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.artifact.tuning import Constraints
from llmc.catalog import load_profile_for, load_target
from llmc.config import Target
from llmc.errors import ConfigError
from llmc.pipeline.tune.choosing import Bound
from llmc.pipeline.tune.workbench import LEVELS, Level
from llmc.profile import Profile

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class TunePlan:
    """The request of a tuning.

    Args:
        model: As the user wrote it.
        adapter: As `BuildPlan`.
        bases: Targets that candidates are derived from; times are ratios to the first.
        profile: The hardware; candidates run on this machine.
        constraints: Bounds for the resulting target.
        seconds: Time for candidates, over all runs of the same tuning; a candidate that is running is
            finished.
        most: Largest number of candidates besides the base; None to limit only the time.
        output: File of the target, in a folder `targets`.
        report: Folder for tuning.json and tuning.html; None to write neither.
        eval_text: Files of evaluation text, `-` for standard input; empty for the built-in text.
        levels: Fidelities at which a candidate is measured, the cheapest first.
    """

    model: str
    bases: tuple[Target, ...]
    profile: Profile
    constraints: Constraints
    seconds: float
    most: int | None
    output: Path
    report: Path | None
    eval_text: tuple[str, ...]
    levels: tuple[Level, ...]
    adapter: str | None = None


def parse_seconds(text: str) -> float:
    """Parse `90s`, `30m`, `1.5h`; a number without a unit is in seconds.

    Raises:
        ConfigError: The text is something else, or not above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(match[1]) * _SECONDS[match[2] or "s"] if match else 0.0
    if seconds <= 0:
        raise ConfigError(f"--budget {text} is not a time", hint="for example 90s, 30m or 1.5h")
    return seconds


def plan_tune(
    model: str,
    *,
    targets: str,
    profile: str,
    output: Path,
    max_kl: float | None = None,
    max_size: float | None = None,
    min_tok_s: float | None = None,
    budget: str = "30m",
    most: int | None = None,
    report: Path | None = None,
    eval_text: Sequence[str] = (),
    path: Path | None = None,
    adapter: str | None = None,
) -> TunePlan:
    """Resolve the names and values that a user gives.

    Args:
        targets: One name, or several separated by commas.
        max_size: Largest size in MB, 10**6 bytes.

    Raises:
        ConfigError: A name is unknown, or a value is not above zero.
    """
    bases = tuple(load_target(name, path) for name in targets.split(","))
    for bound, value in ((Bound.KL, max_kl), (Bound.SIZE, max_size), (Bound.SPEED, min_tok_s)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{bound.value} {value:g} is not above zero")
    return TunePlan(
        model=model,
        bases=bases,
        profile=load_profile_for(bases[0], profile, path),
        constraints=Constraints(
            max_kl=max_kl,
            max_bytes=None if max_size is None else 1e6 * max_size,
            min_tokens_per_s=min_tok_s,
        ),
        seconds=parse_seconds(budget),
        most=most,
        output=output,
        report=report,
        eval_text=tuple(eval_text),
        levels=LEVELS,
        adapter=adapter,
    )
