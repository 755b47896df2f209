"""Time decode steps and prompts of an artifact beside PyTorch on the same GPU, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpu_checks.checks import Check, Found
from gpu_checks.room import Room, drawn_tokens, largest_context
from gpu_checks.sides import SessionSide, Side, TorchSide
from llmc.errors import ResourceError, UnsupportedError

#: Timed steps of a turn and turns of each side; the first turn is not counted.
STEPS, TURNS = 24, 4
#: Times that each side runs a prompt; the first is not counted.
PROMPTS = 4

Open = Callable[[], Side]


def check_decode(room: Room, check: Check) -> Found:
    """Time steps of the artifact without and with a CUDA graph, and of PyTorch run eagerly."""
    return _time_steps(room, check, compiled=False)


def check_compiled(room: Room, check: Check) -> Found:
    """Time steps of the artifact, and of PyTorch compiled over a static cache."""
    return _time_steps(room, check, compiled=True)


def check_ttft(room: Room, check: Check) -> Found:
    """Time a prompt up to its next token, for the artifact and for PyTorch run eagerly."""
    subject = check.subject
    manifest = room.artifact(subject).manifest
    length = largest_context(manifest, check.point.context, 1)
    ids = drawn_tokens(manifest, check.point.batch, length)
    sides, figures = _open(
        {
            "plain": lambda: SessionSide(room.on_device(subject, chooses=True)),
            "torch_eager": lambda: TorchSide(room.original(subject), compiled=False),
        }
    )
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(PROMPTS):
        for name, side in _in_turn(sides, turn):
            start = time.perf_counter()
            side.prefill(ids, 1)
            times[name].append(1e3 * (time.perf_counter() - start))
    for name, milliseconds in times.items():
        figures[f"{name}_ms"] = float(np.median(milliseconds[1:]))
    return Found({"tokens": length, **figures, **_ratios(figures)})


def measure_steps(sides: Mapping[str, Side], ids: np.ndarray) -> dict[str, list[float]]:
    """Return the median milliseconds of a step in every counted turn of each side."""
    tokens = {name: side.prefill(ids, STEPS) for name, side in sides.items()}
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(TURNS):
        for name, side in _in_turn(sides, turn):
            token, times = tokens[name], []
            for _ in range(STEPS):
                start = time.perf_counter()
                token = side.step(token)
                times.append(1e3 * (time.perf_counter() - start))
            side.back(STEPS)
            if turn:
                turns[name].append(float(np.median(times)))
    return turns


def _time_steps(room: Room, check: Check, *, compiled: bool) -> Found:
    """Time the sides that can be opened; those that cannot are named with the reason."""
    subject = check.subject
    manifest = room.artifact(subject).manifest
    context = largest_context(manifest, check.point.context, STEPS)
    ids = drawn_tokens(manifest, check.point.batch, context)
    sides, figures = _open(
        {
            "plain": lambda: SessionSide(room.on_device(subject, chooses=True)),
            "cuda_graph": lambda: SessionSide(room.on_device(subject, graph=True, chooses=True)),
            "torch_compile" if compiled else "torch_eager": lambda: TorchSide(
                room.original(subject), compiled=compiled
            ),
        }
    )
    for name, times in measure_steps(sides, ids).items():
        figures[f"{name}_ms"] = float(np.median(times))
        figures[f"{name}_range_ms"] = [min(times), max(times)]
    return Found({"context": context, **figures, **_ratios(figures)})


def _open(opened: Mapping[str, Open]) -> tuple[dict[str, Side], dict[str, Any]]:
    """Open sides; a part that is missing leaves its side out, with the reason among the figures.

    Raises:
        ResourceError: The artifact itself cannot be opened.
    """
    sides: dict[str, Side] = {}
    figures: dict[str, Any] = {}
    for name, call in opened.items():
        try:
            sides[name] = call()
        except (ResourceError, UnsupportedError) as error:
            if name == "plain":
                raise
            figures[f"{name}_not_measured"] = error.fact
    return sides, figures


def _in_turn(sides: Mapping[str, Side], turn: int) -> list[tuple[str, Side]]:
    named = list(sides.items())
    return named if turn % 2 else named[::-1]


def _ratios(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return PyTorch's time over the time of the artifact's faster mode."""
    own = [figures[f"{name}_ms"] for name in ("plain", "cuda_graph") if f"{name}_ms" in figures]
    return {
        f"times_{name}": figures[f"{name}_ms"] / min(own)
        for name in ("torch_eager", "torch_compile")
        if f"{name}_ms" in figures
    }
