"""What is lost of weights whose codes the checkpoint has and the artifact does not keep exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.config import Metric

if TYPE_CHECKING:
    from llmc.artifact.manifest import WeightRecord
    from llmc.graph.weights import Rows


def loss_notes(folder: Path, weights: Sequence[WeightRecord], sources: Mapping[str, Rows]) -> Iterator[str]:
    """A line on each origin that may have lost something: how many matrices, and how much.

    Read from the files of the artifact, against the checkpoint.

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
        found = {m.metric: m for m in compare_weights(folder, rows).measurements}[Metric.WEIGHTS_SNR]
        what = f"codes of the checkpoint: {origin}: {len(rows)} matrices"
        if found.value is None:
            yield f"{what}, {found.detail}"
        elif found.value == math.inf:
            yield f"{what}, without any loss"
        else:
            worst = min(found.figures, key=lambda name: found.figures[name])
            yield f"{what}, {found.value:.1f} dB below the checkpoint's own values in the worst, {worst}"
