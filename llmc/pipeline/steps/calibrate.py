"""Calibrate within a build: run the model layer by layer on built-in text, and cache the results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmc.artifact.provenance import code_digest, tool_versions
from llmc.artifact.store.cache import content_key, default_cache_folder
from llmc.artifact.store.substitute import current_folder, with_working_folders, working_folder
from llmc.config import CalibrationText, Dtype
from llmc.data import calibration_text
from llmc.errors import UnsupportedError
from llmc.pipeline.steps.original import tokenize
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.checkpoint import Checkpoint
    from llmc.graph.model import Graph
    from llmc.quantize.activations import Activations
    from llmc.quantize.cache_scales import CachePeaks
    from llmc.quantize.calibrate import Calibration
    from llmc.quantize.quantizer import InputNeeds, Observations, Quantizer, WeightNeeds

Result = TypeVar("Result")

#: Number of folders with results, finished or not, in each cache; the least recently used are removed.
#: A build reads pruned weights from there until it ends, and a target has up to three recipes.
_KEPT = {"calibration": 3, "pruning": 6}
#: Packages whose code decides the results in each cache.
_CODE = {
    "calibration": ("calibration", "quantize"),
    "pruning": ("calibration", "prune"),
}
#: The purpose of a calibration of the KV cache.
_CACHE = "cache"
#: Text for the overflow check of a float16 target without calibration of its own.
_OVERFLOW_TEXT = CalibrationText(window_tokens=256, max_windows=4)
#: Largest finite number of float16 (IEEE 754 binary16).
_FLOAT16 = 65504.0
#: Largest number of modules that an error names.
_NAMED = 5


def observe(
    checkpoint: Checkpoint, graph: Graph, quantizer: Quantizer, dtype: Dtype, progress: Progress
) -> Observations:
    """Run the original over calibration text to collect what a quantizer needs.

    Args:
        graph: The lowered graph, not yet quantized.
        dtype: Type that the artifact computes in; the original's values must fit its range.

    Raises:
        ConfigError: The text is too short for the model.
        CheckpointError: Weights or activations are not finite.
        UnsupportedError: The model cannot be run layer by layer, or exceeds the range of `dtype`.
    """
    from llmc.quantize.quantizer import Observations

    weight_needs, input_needs = quantizer.weight_needs(graph), quantizer.input_needs(graph)
    weights = inputs = None
    if weight_needs is not None or input_needs is not None:
        with progress.stage("calibrate"):
            if input_needs is not None:
                inputs = observe_inputs(checkpoint, input_needs, progress)
                require_range(inputs, dtype, progress)
            if weight_needs is not None:
                weights = calibrate_weights(checkpoint, weight_needs, progress)
    return Observations(weights, inputs)


def recall(
    checkpoint: Checkpoint, weight_needs: WeightNeeds | None, input_needs: InputNeeds | None
) -> Observations:
    """Return what `observe` returned for a quantizer with these needs, as far as it is cached.

    Raises:
        UnsupportedError: The model cannot be run layer by layer.
    """
    from llmc.quantize.quantizer import Observations

    return Observations(
        None if weight_needs is None else _recall_weights(checkpoint, weight_needs),
        None if input_needs is None else _recall_inputs(checkpoint, input_needs),
    )


def calibrate_weights(checkpoint: Checkpoint, needs: WeightNeeds, progress: Progress) -> Calibration:
    """Quantize tensors of a checkpoint on calibration text; continues where a killed build stopped.

    Raises:
        As `observe`.
    """
    from llmc.quantize.calibrate import Calibrator
    from llmc.validate.attention import attention_by_rows

    def work() -> Calibration:
        subject = prepare(checkpoint, needs.text, "weights", _facts(needs))
        calibrator = Calibrator(
            subject.model,
            subject.layers,
            checkpoint.tensors,
            dict(checkpoint.tied),
            needs.schemes,
            needs.scale_type,
            subject.folder,
            needs.channels,
            needs.experts,
        )
        windows = subject.windows
        with attention_by_rows(subject.model, windows.size, windows.shape[1]):
            return calibrator.run(windows, lambda line: progress.note(f"calibrate: {line}"))

    return walking(work)


def _recall_weights(checkpoint: Checkpoint, needs: WeightNeeds) -> Calibration | None:
    """Return the result of `calibrate_weights` if it is completely cached, otherwise None."""
    from llmc.calibration.walk import finished_files
    from llmc.quantize.calibrate import read_calibration

    subject = _plan(checkpoint, needs.text, "weights", _facts(needs))
    files = finished_files(subject.folder, len(subject.layers))
    return None if files is None else read_calibration(files, needs.schemes, needs.experts)


def _facts(needs: WeightNeeds) -> dict[str, Any]:
    """List what the results of a calibration depend on besides the checkpoint and the text."""
    import numpy as np

    return {
        "scales": np.dtype(needs.scale_type).name,
        "schemes": {name: scheme.model_dump() for name, scheme in sorted(needs.schemes.items())},
        "channels": [[*plan.sources] for plan in needs.channels],
        "experts": {name: scheme.model_dump() for name, scheme in sorted(needs.experts.items())},
    }


def observe_inputs(checkpoint: Checkpoint, needs: InputNeeds, progress: Progress) -> Activations:
    """Run the original over calibration text to measure ranges of activations and peaks of all modules.

    Raises:
        As `observe`.
    """
    from llmc.calibration.walk import LayerWalk
    from llmc.quantize.activations import ActivationTask, read_activations

    tied = dict(checkpoint.tied)

    def work() -> Activations:
        subject = prepare(checkpoint, needs.text, "activations", _input_facts(needs))
        walk = LayerWalk(subject.model, subject.layers, checkpoint.tensors, tied, subject.folder)
        task = ActivationTask(needs.plans, tied, subject.layers, len(subject.windows), needs.experts)
        files = walk.run(subject.windows, task, lambda line: progress.note(f"calibrate: {line}"))
        return read_activations(files)

    return walking(work)


def _recall_inputs(checkpoint: Checkpoint, needs: InputNeeds) -> Activations | None:
    """Return the result of `observe_inputs` if it is completely cached, otherwise None."""
    from llmc.calibration.walk import finished_files
    from llmc.quantize.activations import read_activations

    subject = _plan(checkpoint, needs.text, "activations", _input_facts(needs))
    files = finished_files(subject.folder, len(subject.layers))
    return None if files is None else read_activations(files)


def observe_cache(checkpoint: Checkpoint, text: CalibrationText, progress: Progress) -> dict[int, CachePeaks]:
    """Run the original over calibration text to measure what its layers store in their KV cache.

    Returns:
        Largest magnitudes of keys and values, by the number of the layer.

    Raises:
        As `observe`.
    """
    from llmc.quantize.cache_scales import CacheWalk

    tied = dict(checkpoint.tied)

    def work() -> dict[int, CachePeaks]:
        subject = prepare(checkpoint, text, _CACHE, {})
        walk = CacheWalk(subject.model, subject.layers, checkpoint.tensors, tied, subject.folder)
        return walk.run_peaks(subject.windows, lambda line: progress.note(f"calibrate: {line}"))

    with progress.stage("calibrate the KV cache"):
        return walking(work)


def recall_cache(checkpoint: Checkpoint, text: CalibrationText) -> dict[int, CachePeaks] | None:
    """Return the result of `observe_cache` if it is completely cached, otherwise None.

    Raises:
        UnsupportedError: The model cannot be run layer by layer.
    """
    from llmc.calibration.walk import finished_files
    from llmc.quantize.cache_scales import read_peaks

    subject = _plan(checkpoint, text, _CACHE, {})
    files = finished_files(subject.folder, len(subject.layers))
    return None if files is None else read_peaks(files)


def _input_facts(needs: InputNeeds) -> dict[str, Any]:
    plans = [[*plan.sources, plan.kind.value, plan.foldable, plan.by_token] for plan in needs.plans]
    return {"plans": plans, "experts": [[plan.parameter, plan.kind.value] for plan in needs.experts]}


def look_for_overflow(checkpoint: Checkpoint, dtype: Dtype, progress: Progress) -> Activations:
    """Measure the original's peaks on some text if the target computes in float16; otherwise return none.

    Raises:
        UnsupportedError: Results of a module do not fit into float16.
        CheckpointError: Weights or activations are not finite.
    """
    from llmc.quantize.activations import Activations
    from llmc.quantize.quantizer import InputNeeds

    if dtype is not Dtype.FLOAT16:
        return Activations()
    with progress.stage("overflow"):
        try:
            activations = observe_inputs(checkpoint, InputNeeds(_OVERFLOW_TEXT, ()), progress)
        except UnsupportedError as error:
            progress.note(f"overflow: the range of float16 was not checked: {error.fact}")
            return Activations()
        require_range(activations, dtype, progress)
    return activations


def require_range(activations: Activations, dtype: Dtype, progress: Progress) -> None:
    """Require that the peaks of a model's modules fit into float16.

    Raises:
        UnsupportedError: Some do not; they are named.
    """
    if dtype is not Dtype.FLOAT16:
        return
    over = {name: peak for name, peak in activations.peaks.items() if peak > _FLOAT16}
    if over:
        worst = sorted(over, key=lambda name: -over[name])
        listed = ", ".join(f"{name} ({over[name]:,.0f})" for name in worst[:_NAMED])
        more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
        raise UnsupportedError(
            f"float16 ends at {_FLOAT16:,.0f}, but on the calibration text these modules return larger "
            f"values: {listed}{more}",
            hint="use a target in bfloat16, such as tensorrt-bf16, or one in float32",
        )
    name = max(activations.peaks, key=lambda n: activations.peaks[n])
    peak = activations.peaks[name]
    progress.note(
        f"overflow: the largest value on the calibration text is {peak:,.0f}, from {name}; "
        f"float16 ends at {_FLOAT16:,.0f}"
    )


@dataclass(frozen=True)
class PreparedModel:
    """A model to run over a text, layer by layer."""

    model: Any
    layers: tuple[str, ...]
    windows: Any
    folder: Path


def prepare(
    checkpoint: Checkpoint,
    text: CalibrationText,
    purpose: str,
    facts: Mapping[str, Any],
    shelf: str = "calibration",
) -> PreparedModel:
    """Return the model without weights, its text, and the folder for results of this purpose.

    Args:
        shelf: Cache with its own limit: `calibration` or `pruning`.
    """
    subject = _plan(checkpoint, text, purpose, facts, shelf)
    folder = working_folder(default_cache_folder() / shelf, subject.folder.name, _KEPT[shelf])
    return replace(subject, folder=folder)


def _plan(
    checkpoint: Checkpoint,
    text: CalibrationText,
    purpose: str,
    facts: Mapping[str, Any],
    shelf: str = "calibration",
) -> PreparedModel:
    """Do what `prepare` does without creating the folder."""
    from llmc.checkpoint.skeleton import build_hollow
    from llmc.trace.positions import stated_positions
    from llmc.trace.stamp import find_layers

    tokens, start = tokenize(checkpoint.tokenizer(), calibration_text())
    windows = cut_text(tokens, start, text, stated_positions(checkpoint.config))
    model = build_hollow(checkpoint.config)
    layers = find_layers(model, checkpoint.config.get_text_config(), stamp=False).names
    if not layers:
        raise UnsupportedError(f"{checkpoint.architecture} has no list of decoder layers to run one by one")
    key = calibration_key(checkpoint, purpose, windows, facts, shelf)
    folder = current_folder(default_cache_folder() / shelf) / key
    return PreparedModel(model, layers, windows, folder)


def cut_text(tokens: Any, start: tuple[int, ...], text: CalibrationText, positions: int | None) -> Any:
    """Cut windows that do not overlap, each after the tokenizer's `start`, (windows, length) int64.

    Args:
        positions: Largest number of tokens per window that the model accepts; None for any.
    """
    import numpy as np

    most = text.window_tokens if positions is None else min(text.window_tokens, positions)
    length = min(most - len(start), len(tokens))
    count = max(1, min(text.max_windows, len(tokens) // length))
    rows = [[*start, *tokens[i * length : (i + 1) * length]] for i in range(count)]
    return np.array(rows, np.int64)


def calibration_key(
    checkpoint: Checkpoint, purpose: str, windows: Any, facts: Mapping[str, Any], shelf: str
) -> str:
    """Return the cache key of the calibration of these weights on these tokens, for one purpose."""
    inputs = {
        "checkpoint": checkpoint.digest(),
        "purpose": purpose,
        "facts": dict(facts),
        "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
        "tools": tool_versions(),
        "code": code_digest(*(f"llmc.{package}" for package in _CODE[shelf])),
    }
    return content_key("calibration", inputs)


def walking(work: Callable[[], Result], shelf: str = "calibration") -> Result:
    """Run a walk over a model, in temporary folders if the cache has no space for its results.

    Args:
        work: The walk, which calls `prepare` with this shelf.
    """
    return with_working_folders(default_cache_folder() / shelf, work)
