"""What an artifact's graph holds, against what a build makes of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Family, Metric
from llmc.errors import ParityError
from llmc.validate.measure import broken, unmeasured

if TYPE_CHECKING:
    from llmc.pipeline.gate.subject import Subject
    from llmc.progress import Progress
    from llmc.validate.weights import WeightParity

_WHERE = "numpy, from the files"


def compare_contents(subject: Subject, progress: Progress) -> WeightParity:
    """Hold the weights of an artifact to the checkpoint, and all of its graph to what a build gives."""
    from dataclasses import replace

    from llmc.validate.weights import WeightParity, compare_weights

    with progress.stage("weights"):
        try:
            found = compare_weights(subject.folder, subject.sources, progress.advance)
        except ParityError as error:
            found = WeightParity(broken(Family.WEIGHTS.metrics, error, _WHERE), "", ())
    with progress.stage("weights, bit for bit"):
        exact = _measure_exact(subject, progress)
    return replace(found, measurements=(*exact, *found.measurements))


def _measure_exact(subject: Subject, progress: Progress) -> tuple[Measurement, ...]:
    from llmc.validate.exact import measure_graph, measure_tensors

    rebuilt = subject.rebuilt
    calibrated = {name: rebuilt.sources[name] for name in sorted(rebuilt.calibrated)}
    try:
        graph = measure_graph(subject.folder, rebuilt.graph.model, subject.built_otherwise)
        if subject.foreign:
            why = "the original is not the model that the artifact was built from"
            status = MeasurementStatus.NOT_APPLICABLE
            return graph, unmeasured(Metric.WEIGHTS_EXACT, status, why, _WHERE)
        beside = [*_compare_smoothing(subject)]
        expected = rebuilt.graph.graph
        return graph, measure_tensors(subject.folder, expected, calibrated, beside, progress.advance)
    except ParityError as error:
        return broken((Metric.GRAPH, Metric.WEIGHTS_EXACT), error, _WHERE)


def _compare_smoothing(subject: Subject) -> Iterator[str]:
    """What differs in the vectors that channels were divided by, where calibration gave them once more.

    Raises:
        ParityError: The artifact's cannot be read.
    """
    import numpy as np

    from llmc.quantize.activations import read_smoothing

    wanted = subject.rebuilt.smoothing
    if wanted is None:
        return
    stored = read_smoothing(subject.folder)
    for name in sorted({*wanted, *stored}):
        if name not in wanted or name not in stored:
            yield f"what the input of {name} is scaled by is {'added' if name in stored else 'missing'}"
        elif not np.array_equal(stored[name], wanted[name]):
            yield f"what the input of {name} is scaled by differs"
