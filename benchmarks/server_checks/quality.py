"""Measure quality and cost at 4 bits by group, against llm-compressor's GPTQ and AutoRound."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from common.fidelity import cut_windows, window_losses
from common.quantizers import AUTOROUND, GPTQ, GROUPS, LLMC, Cost, Scheme, quantize
from common.sources import checkpoint
from common.timing import ratio

from llmc.checkpoint import open_checkpoint
from server_checks.check import Check, Figures, Settings

#: Goals: dNLL against the better of both tools, and time and memory against each of them.
LESS_LOST, TIME, MEMORY = 0.9, 1.0, 0.5
#: All windows of the evaluation text that fit.
_WINDOWS = 1000
_SOURCES = ("rescaled", "gemma3-270m")


def list_checks() -> list[Check]:
    """Return the checks of quality, then those of cost."""
    checks = []
    for source in _SOURCES:
        for symmetric in (True, False):
            name = f"quality/{source}/{'symmetric' if symmetric else 'asymmetric'}"
            goal = f"dNLL at 4 bits by {GROUPS[source]}: <= {LESS_LOST} x the better of both"
            run = partial(measure_quality, source, symmetric)
            checks.append(Check(name, goal, run, missed_quality, lambda s: f"{s.iters} steps of AutoRound"))
    goal = f"wall <= {TIME} x, peak memory <= {MEMORY} x theirs"
    for source in _SOURCES:
        run = partial(measure_cost, source)
        checks.append(Check(f"cost/{source}", goal, run, missed_cost, lambda s: f"{s.rounds}, {s.iters}"))
    return checks


def measure_quality(source: str, symmetric: bool, settings: Settings) -> Figures:
    """Return dNLL of each tool in nats per token, with the standard error over windows of the text."""
    folder = checkpoint(source, settings.cache)
    original = open_checkpoint(str(folder))
    windows = cut_windows(original, _WINDOWS)
    file = settings.cache / f"{source}-losses.npy"
    if not file.is_file():
        np.save(file, window_losses(original, windows))
    base = np.load(file)
    scheme = Scheme(GROUPS[source], symmetric, settings.iters)
    figures: Figures = {}
    for tool in (LLMC, GPTQ, AUTOROUND):
        with TemporaryDirectory(dir=settings.cache) as scratch:
            output = Path(scratch) / "output"
            cost = quantize(tool, folder, output, scheme, settings.cache, settings.peers)
            lost = window_losses(open_checkpoint(str(output)), windows) - base
        figures[tool] = float(lost.mean())
        figures[f"{tool}, standard error"] = float(lost.std(ddof=1) / len(lost) ** 0.5)
        figures[f"{tool}, CPU s"] = cost.cpu
    figures["ratio"] = figures[LLMC] / min(figures[GPTQ], figures[AUTOROUND])
    figures["steps of AutoRound"] = settings.iters
    return figures


def missed_quality(figures: Figures) -> str | None:
    """Return why the goal of quality is missed, or None."""
    found = figures["ratio"]
    return None if found <= LESS_LOST else f"{found:.3f} x the better of both"


def measure_cost(source: str, settings: Settings) -> Figures:
    """Return medians of wall time and peak memory of builds in turn, and ratios with their ranges."""
    folder = checkpoint(source, settings.cache)
    scheme = Scheme(GROUPS[source], iters=settings.iters)
    costs: dict[str, list[Cost]] = {LLMC: [], GPTQ: []}
    for _ in range(settings.rounds):
        for tool, found in costs.items():
            with TemporaryDirectory(dir=settings.cache) as scratch:
                output = Path(scratch) / "output"
                found.append(quantize(tool, folder, output, scheme, settings.cache, settings.peers))
                shutil.rmtree(output)
    figures: Figures = {}
    for tool, found in costs.items():
        figures[f"{tool}, s"] = float(np.median([cost.seconds for cost in found]))
        figures[f"{tool}, GB"] = float(np.median([cost.peak_bytes for cost in found])) / 1e9
    ours, theirs = costs[LLMC], costs[GPTQ]
    figures["wall"] = ratio([c.seconds for c in ours], [c.seconds for c in theirs])
    figures["memory"] = ratio([c.peak_bytes for c in ours], [c.peak_bytes for c in theirs])
    return figures


def missed_cost(figures: Figures) -> str | None:
    """Return which goals of cost are missed, or None."""
    wall = figures[f"{LLMC}, s"] / figures[f"{GPTQ}, s"]
    memory = figures[f"{LLMC}, GB"] / figures[f"{GPTQ}, GB"]
    missed = [f"wall {wall:.2f} x"] if wall > TIME else []
    missed += [f"memory {memory:.2f} x"] if memory > MEMORY else []
    return ", ".join(missed) or None
