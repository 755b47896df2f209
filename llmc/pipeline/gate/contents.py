"""Compare the contents of an artifact's graph with what a build makes of the checkpoint."""

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
    """Compare an artifact's weights with the checkpoint, and its whole graph with the result of a build."""
    from dataclasses import replace

    from llmc.validate.weights import WeightParity, compare_weights

    with progress.stage("weights"):
        try:
            parity = compare_weights(subject.folder, subject.sources, progress.advance)
        except ParityError as error:
            parity = WeightParity(broken(Family.WEIGHTS.metrics, error, _WHERE), "", ())
    with progress.stage("weights, bit for bit"):
        exact = _measure_exact(subject, progress)
    return replace(parity, measurements=(*exact, *parity.measurements))


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
    """Describe differences in the divisors of channels, if calibration could be repeated.

    Raises:
        ParityError: The artifact's divisors cannot be read.
    """
    import numpy as np

    from llmc.quantize.activations import read_smoothing

    expected = subject.rebuilt.smoothing
    if expected is None:
        return
    stored = read_smoothing(subject.folder)
    for name in sorted({*expected, *stored}):
        if name not in expected or name not in stored:
            yield f"the scales for the input of {name} are {'added' if name in stored else 'missing'}"
        elif not np.array_equal(stored[name], expected[name]):
            yield f"the scales for the input of {name} differ"
