"""Hold the files of ranks to the whole weights: their bytes, and their logits over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmc.artifact.ranks import RANKS
from llmc.checkpoint.ranks import RankStore, find_differences
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.config import Family, Gate, Metric
from llmc.pipeline.gate.parity import Extra
from llmc.pipeline.steps.ranks import compare_ranks
from llmc.validate.measure import measured, mismatches

if TYPE_CHECKING:
    from llmc.pipeline.gate.run import Run

#: Tokens of the evaluation text that are computed.
_TOKENS = 64

_GATES = (
    Gate(
        metric=Metric.RANKS_EXACT,
        max=0,
        reason="tensors; each rank has slices of the whole weights, bit for bit",
    ),
    Gate(
        metric=Metric.RANKS_MAX_ABS,
        max=1e-4,
        reason="logits in float32; only sums are ordered otherwise, a wrong slice is off by whole logits",
    ),
)


def rank_extras(folder: Path) -> list[Extra]:
    """Return the step of the gate that measures ranks; none if the artifact has no folder of them."""
    if not (folder / RANKS).exists():
        return []
    return [Extra(Family.RANKS.metrics, _GATES, measure_ranks)]


def measure_ranks(run: Run) -> None:
    """Measure RANKS_EXACT and RANKS_MAX_ABS."""
    folder = run.subject.folder
    layout = RankStore.open(folder).layout
    ranks = len(layout.ranks)
    with run.progress.stage("files of ranks"):
        differences = tuple(find_differences(folder, SafetensorsStore.open(folder)))
    fine = f"{ranks} ranks have slices of the whole weights, under the names of {layout.names}"
    run.found.append(mismatches(Metric.RANKS_EXACT, differences, fine, "bytes, from the files"))
    with run.progress.stage(f"{ranks} ranks"):
        found = compare_ranks(folder, ranks, np.asarray(run.tokens[:_TOKENS])[None])
    figures = {"weights_ratio": found.weights, "memory_ratio": found.growth}
    detail = (
        f"{ranks} processes over gloo, each with at most {found.weights:.3f} of the weights and "
        f"{found.growth:.3f} of the memory that loading and running it takes"
    )
    where = "transformers, float32, CPU"
    run.found.append(measured(Metric.RANKS_MAX_ABS, found.max_abs, detail, where, figures))
