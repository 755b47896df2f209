"""Twice as many windows of the text are looked at where the first ones do not decide a gate."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmc.config import Gate, Metric
from llmc.pipeline.gate import graph as gate_graph
from llmc.validate.measure import measured
from llmc.validate.quality import Windows

AT_MOST = Gate(metric=Metric.TEXT_KL_MEAN, max=0.1, reason="room for rounding")


@pytest.mark.parametrize(
    ("high", "count", "asked"),
    [(0.09, 8, [4]), (0.2, 8, [4, 8]), (0.2, 4, [4])],
    ids=["decided", "more", "all"],
)
def test_how_many_windows(high: float, count: int, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def measure(_: Any, __: Any, windows: Windows, *rest: Any) -> tuple[Any, ...]:
        seen.append(len(windows.tokens))
        return (measured(Metric.TEXT_KL_MEAN, 0.08, "", "here", interval=(0.05, high)),)

    monkeypatch.setattr("llmc.validate.quality.measure_quality", measure)
    monkeypatch.setattr(gate_graph, "bound_on_divergence", lambda *_: None)
    monkeypatch.setattr(gate_graph, "is_large", lambda _: False)
    every = Windows(np.zeros((count, 20), np.int64), 4)
    run = SimpleNamespace(
        subject=SimpleNamespace(target=SimpleNamespace(gates=[AT_MOST]), compiled=None),
        original=SimpleNamespace(prepare=lambda *_: None, release=lambda: None),
        progress=SimpleNamespace(advance=None),
        windows=every.sample(4),
        all_windows=every,
    )
    gate_graph._quality(run, None, None, None)
    assert seen == asked
