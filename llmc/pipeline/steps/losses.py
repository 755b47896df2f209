"""Measure the loss of weights that the checkpoint stores as codes and the artifact stores otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.config import Metric
from llmc.pipeline.steps.stored import read_weights

if TYPE_CHECKING:
    from llmc.artifact.manifest import WeightRecord
    from llmc.backends.base import Backend
    from llmc.graph.weights import Rows


def loss_notes(
    folder: Path, backend: Backend, weights: Sequence[WeightRecord], sources: Mapping[str, Rows]
) -> Iterator[str]:
    """Describe each origin that may be lossy on a line: number of matrices, and the loss.

    The files of the artifact are compared with the checkpoint.

    Raises:
        ParityError: A weight cannot be found in the files.
    """
    from llmc.quantize.stored import KEPT, MADE_FLOATS
    from llmc.validate.weights import compare_weights

    by_origin: dict[str, dict[str, Rows]] = {}
    for weight in weights:
        if weight.origin not in (None, KEPT, MADE_FLOATS) and weight.name in sources:
            by_origin.setdefault(weight.origin, {})[weight.name] = sources[weight.name]
    for origin, rows in by_origin.items():
        parity = compare_weights(read_weights(folder, backend, rows), rows)
        measurement = {m.metric: m for m in parity.measurements}[Metric.WEIGHTS_SNR]
        what = f"codes of the checkpoint: {origin}: {len(rows)} matrices"
        if measurement.value is None:
            yield f"{what}, {measurement.detail}"
        elif measurement.value == math.inf:
            yield f"{what}, without any loss"
        else:
            worst = min(measurement.figures, key=lambda name: measurement.figures[name])
            yield f"{what}, {measurement.value:.1f} dB below the checkpoint's values in {worst}, the worst"
