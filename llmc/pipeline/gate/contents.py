"""Compare the contents of an artifact's graph with what a build makes of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Family, Metric
from llmc.errors import LlmcError, ParityError
from llmc.pipeline.steps.stored import read_weights
from llmc.validate.measure import broken, unmeasured

if TYPE_CHECKING:
    from pathlib import Path

    from llmc.checkpoint.safetensors import SafetensorsStore
    from llmc.pipeline.gate.subject import Subject
    from llmc.progress import Progress
    from llmc.validate.weights import WeightParity

_WHERE = "numpy, from the files"
_NOT_APPLICABLE = MeasurementStatus.NOT_APPLICABLE
_FOREIGN = "the original is not the model that the artifact was built from"
#: Ends of the names of tensors of a checkpoint: those that calibration of activations decides, those that
#: calibration of the KV cache decides, those that do not depend on codes, and those that do not where codes
#: are symmetric.
_INPUT_SCALES = (".input_scale", ".input_global_scale")
_CACHE_SCALES = (".k_scale", ".v_scale")
_SHAPES = (".g_idx", ".weight_shape")
_ZERO_POINTS = (".qzeros", ".weight_zero_point")


def compare_contents(subject: Subject, progress: Progress) -> WeightParity:
    """Compare an artifact's weights with the checkpoint, and its whole graph with the result of a build."""
    from dataclasses import replace

    from llmc.validate.weights import WeightParity, compare_weights

    with progress.stage("weights"):
        try:
            stored = read_weights(subject.folder, subject.backend, subject.sources)
            parity = compare_weights(stored, subject.sources, progress.advance)
        except ParityError as error:
            parity = WeightParity(broken(Family.WEIGHTS.metrics, error, _WHERE), "", ())
    with progress.stage("weights, bit for bit"):
        exact = _measure_exact(subject, progress)
    return replace(parity, measurements=(*exact, *parity.measurements))


def _measure_exact(subject: Subject, progress: Progress) -> tuple[Measurement, ...]:
    if not subject.backend.writes_graph:
        return _measure_files(subject, progress)
    from llmc.validate.exact import measure_graph, measure_tensors

    rebuilt = subject.rebuilt
    calibrated = {name: rebuilt.sources[name] for name in sorted(rebuilt.calibrated)}
    try:
        graph = measure_graph(subject.folder, rebuilt.graph.model, subject.built_otherwise)
        if subject.foreign:
            return graph, unmeasured(Metric.WEIGHTS_EXACT, _NOT_APPLICABLE, _FOREIGN, _WHERE)
        beside = [*_compare_smoothing(subject)]
        expected = rebuilt.graph.graph
        return graph, measure_tensors(subject.folder, expected, calibrated, beside, progress.advance)
    except ParityError as error:
        return broken((Metric.GRAPH, Metric.WEIGHTS_EXACT), error, _WHERE)


def _measure_files(subject: Subject, progress: Progress) -> tuple[Measurement, ...]:
    """Compare every tensor of a checkpoint with what a build writes; there are no nodes to compare."""
    from llmc.checkpoint.safetensors import SafetensorsStore
    from llmc.validate.exact_checkpoint import measure_files

    rebuilt = subject.rebuilt
    graph = unmeasured(Metric.GRAPH, _NOT_APPLICABLE, "a checkpoint has no graph", _WHERE)
    if subject.foreign:
        return graph, unmeasured(Metric.WEIGHTS_EXACT, _NOT_APPLICABLE, _FOREIGN, _WHERE)
    try:
        try:
            stored = SafetensorsStore.open(subject.folder)
        except LlmcError as error:
            raise ParityError(error.fact) from error
        exact = measure_files(
            stored,
            subject.backend.written_tensors(rebuilt.graph, subject.target, subject.compiled),
            _unknown_tensors(subject),
            [*_compare_smoothing(subject), *_strangers(subject), *_unread_files(stored, subject.folder)],
            progress.advance,
        )
    except ParityError as error:
        return graph, *broken((Metric.WEIGHTS_EXACT,), error, _WHERE)
    return graph, exact


def _unknown_tensors(subject: Subject) -> Callable[[str, str | None], bool]:
    """Return what tells which tensors of a checkpoint depend on calibration whose results are not here."""
    rebuilt = subject.rebuilt
    calibrated = {source for name in rebuilt.calibrated for source in rebuilt.sources[name].sources}
    symmetric = {
        source
        for record in subject.weights
        if record.symmetric and record.name in rebuilt.sources
        for source in rebuilt.sources[record.name].sources
    }

    def is_unknown(name: str, weight: str | None) -> bool:
        if not rebuilt.complete and name.endswith(_INPUT_SCALES):
            return True
        if not rebuilt.cache_known and name.endswith(_CACHE_SCALES):
            return True
        if weight not in calibrated or name.endswith(_SHAPES):
            return False
        return not (weight in symmetric and name.endswith(_ZERO_POINTS))

    return is_unknown


def _unread_files(stored: SafetensorsStore, folder: Path) -> list[str]:
    """Describe files beside the weights that a build does not write, and from which servers load instead.

    vLLM reads every safetensors file, but those alone that an index names, whether they exist or not.
    """
    from llmc.checkpoint.safetensors import INDEX

    read = {file.name for file in stored.files}
    strange = [file.name for file in sorted(folder.glob("*.safetensors")) if file.name not in read]
    if len(read) == 1 and (folder / INDEX).exists():
        strange.append(INDEX)
    return [f"{name} is not written by a build" for name in strange]


def _strangers(subject: Subject) -> list[str]:
    """Describe matrices with calibrated codes that are not a rounding of the checkpoint's."""
    from llmc.validate.resemblance import find_strangers

    rebuilt = subject.rebuilt
    sources = {name: rebuilt.sources[name] for name in sorted(rebuilt.calibrated)}
    if not sources:
        return []
    try:
        return find_strangers(read_weights(subject.folder, subject.backend, sources), sources)
    except ParityError as error:  # the tensors at fault are named, too
        return [error.fact]


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
