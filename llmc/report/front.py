"""Render a tuning as text and as a page: its candidates, their Pareto front, and which was chosen."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmc.artifact.store.disk import replace_text
from llmc.artifact.tuning import Candidate, Tuning
from llmc.report.figures import format_estimate, format_figure
from llmc.report.html import render_page
from llmc.report.pictures import FAINT, FIRST, SECOND, draw_svg

_COLUMNS = ("", "candidate", "KL (95 %)", "tokens/s", "decode / base", "first token, ms", "MB")
#: Axes of the pictures: the caption, the label and the value of the horizontal axis.
_ACROSS: tuple[tuple[str, str, Callable[[Candidate], float]], ...] = (
    ("Faithfulness and decode speed", "tokens/s", lambda c: c.tokens_per_s),
    ("Faithfulness and size", "MB", lambda c: c.bytes / 1e6),
    ("Faithfulness and time to first token", "ms", lambda c: c.first_ms),
)


def render_front(tuning: Tuning, *, width: int = 140) -> str:
    """Render the base, the front, and the choice as a table for a terminal; with the notes below it."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*_COLUMNS)
    shown = {tuning.candidates[0].digest, *tuning.front}
    for candidate in order_candidates(tuning):
        if candidate.digest in shown:
            table.add_row(*(Text(cell) for cell in row(tuning, candidate)))
    buffer = StringIO()
    console = Console(file=buffer, width=width, no_color=True, highlight=False)
    console.print(table)
    return buffer.getvalue() + "\n".join(notes(tuning))


def write_tuning(tuning: Tuning, folder: Path) -> None:
    """Write tuning.json and tuning.html into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "tuning.json", tuning.model_dump_json(indent=2) + "\n")
    page = render_page(
        "front.html",
        tuning,
        _pictures(tuning),
        tuning=tuning,
        columns=_COLUMNS,
        rows=[row(tuning, c) for c in order_candidates(tuning)],
        notes=notes(tuning),
    )
    replace_text(folder / "tuning.html", page)


def order_candidates(tuning: Tuning) -> list[Candidate]:
    """Return the candidates measured most closely first, and among these the most faithful first."""
    return sorted(tuning.candidates, key=lambda c: (-c.level, c.kl))


def row(tuning: Tuning, candidate: Candidate) -> tuple[str, ...]:
    """Return one candidate's cells, in the order of the columns."""
    return (
        _mark(tuning, candidate),
        candidate.label,
        format_estimate(candidate.kl, candidate.kl_low, candidate.kl_high),
        format_figure(candidate.tokens_per_s),
        f"{1 / candidate.step_ratio:.3f} x",
        f"{candidate.first_ms:.1f}",
        f"{candidate.bytes / 1e6:.1f}",
    )


def notes(tuning: Tuning) -> list[str]:
    """Return notes on how the figures were measured."""
    early = sum(c.level + 1 < len(tuning.levels) for c in tuning.candidates)
    lines = [
        f"{len(tuning.candidates)} candidates in {tuning.seconds:.0f} s on {tuning.where}, {tuning.threads}"
        f" threads; {early} not measured to the end, {len(tuning.refused)} refused",
        *(f"level {i}: {description}" for i, description in enumerate(tuning.levels)),
        f"tokens/s and ms are those of {tuning.base} by itself, times the ratio measured in turn with it",
    ]
    return lines + [f"refused: {r.label}: {r.reason}" for r in tuning.refused]


def _mark(tuning: Tuning, candidate: Candidate) -> str:
    marks = [
        name
        for name, applies in (
            ("CHOSEN", candidate.digest == tuning.chosen),
            ("base", candidate.digest == tuning.candidates[0].digest),
            ("front", candidate.digest in tuning.front),
            (f"level {candidate.level}", candidate.level + 1 < len(tuning.levels)),
        )
        if applies
    ]
    return " ".join(marks)


def _pictures(tuning: Tuning) -> dict[str, str]:
    drawn = {}
    for caption, label, across in _ACROSS:

        def plot(axes: Any, label: str = label, across: Callable[[Candidate], float] = across) -> None:
            _scatter(axes, tuning, across)
            axes.set_xlabel(label)

        drawn[f"{caption}: KL divergence, nats per token, up"] = draw_svg(plot)
    return drawn


def _scatter(axes: Any, tuning: Tuning, across: Callable[[Candidate], float]) -> None:
    """Draw candidates as dots, those on the front filled, the chosen one ringed."""
    front = [c for c in tuning.candidates if c.digest in tuning.front]
    rest = [c for c in tuning.candidates if c.digest not in tuning.front]
    chosen = [c for c in tuning.candidates if c.digest == tuning.chosen]
    base = tuning.candidates[:1]

    def put(of: Sequence[Candidate], label: str, **style: Any) -> None:
        if of:
            axes.scatter([across(c) for c in of], [c.kl for c in of], label=label, **style)

    put(rest, "dominated", color=FAINT, s=16)
    put(front, "front", color=FIRST, s=30)
    put(base, "base", color=SECOND, s=30, marker="s")
    put(chosen, "chosen", facecolors="none", edgecolors=SECOND, s=120)
    if all(c.kl > 0 for c in tuning.candidates):
        axes.set_yscale("log")
    axes.legend()
