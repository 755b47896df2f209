"""Print the outcomes as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gpu_checks.record import Outcome, Status

#: Figures of a row that stand in the table; the JSON has all of them.
_MOST = 9


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Print one line for each outcome: the check, its status, and its figures or its reason."""
    width = max((len(outcome.check) for outcome in outcomes), default=0)
    for outcome in outcomes:
        if outcome.status is Status.NOT_MEASURED:
            print(f"{outcome.check:{width}}  not measured: {outcome.why}")
            continue
        told = ", ".join(_describe(outcome.figures))
        failed = f"failed: {outcome.why}" if outcome.status is Status.FAILED else ""
        print(f"{outcome.check:{width}}  {'; '.join(part for part in (failed, told) if part)}")
    counts = Counter(outcome.status for outcome in outcomes)
    print(", ".join(f"{counts[status]} {status.value}" for status in Status))


def _describe(figures: dict[str, Any]) -> list[str]:
    shown = [
        f"{name} {shorten(value)}" for name, value in figures.items() if not isinstance(value, (list, dict))
    ]
    shown += [
        f"{name} {' '.join(f'{key} {count}' for key, count in value.items()) or 'none'}"
        for name, value in figures.items()
        if isinstance(value, dict) and all(isinstance(count, int) for count in value.values())
    ]
    return shown[:_MOST]


def shorten(value: Any) -> str:
    """Return a figure for people, with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
