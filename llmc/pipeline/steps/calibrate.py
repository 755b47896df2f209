"""Calibration within a build: the text that ships, the model layer by layer, what is kept between builds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
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
    from llmc.quantize.activations import Activations, InputPlan
    from llmc.quantize.calibrate import Calibration
    from llmc.quantize.quantizer import InputNeeds, Observations, Quantizer, WeightNeeds

Result = TypeVar("Result")

#: Where what walks find is kept, finished or not, and how many of each; those not used for longest go.
#: Pruned weights are read from there for as long as a build takes, and a target has up to three recipes.
_KEPT = {"calibration": 3, "pruning": 6}
#: What decides the results that are kept there.
_CODE = {
    "calibration": ("calibration", "quantize"),
    "pruning": ("calibration", "prune"),
}
#: What a target in float16 without calibration of its own is looked at on.
_OVERFLOW_TEXT = CalibrationText(window_tokens=256, max_windows=4)
#: Largest finite number of float16 (IEEE 754 binary16).
_FLOAT16 = 65504.0
#: Most modules that an error names.
_NAMED = 5


def observe(
    checkpoint: Checkpoint, graph: Graph, quantizer: Quantizer, dtype: Dtype, progress: Progress
) -> Observations:
    """Run the original over calibration text, for what a quantizer needs to know of it.

    Args:
        graph: Lowered, not yet quantized.
        dtype: Type that the artifact computes in, whose range the original's values must fit.

    Raises:
        ConfigError: Too little text for the model.
        CheckpointError: Weights or activations that are not finite.
        UnsupportedError: The model cannot be run layer by layer, or leaves the range of `dtype`.
    """
    from llmc.quantize.quantizer import Observations

    weight_needs, input_needs = quantizer.weight_needs(graph), quantizer.input_needs(graph)
    weights = inputs = None
    if weight_needs is not None or input_needs is not None:
        with progress.stage("calibrate"):
            if input_needs is not None:
                inputs = observe_inputs(checkpoint, input_needs.text, input_needs.plans, progress)
                require_range(inputs, dtype, progress)
            if weight_needs is not None:
                weights = calibrate_weights(checkpoint, weight_needs, progress)
    return Observations(weights, inputs)


def recall(checkpoint: Checkpoint, graph: Graph, quantizer: Quantizer) -> Observations:
    """What `observe` gave for the same arguments, as far as the cache has it.

    Raises:
        UnsupportedError: The model cannot be run layer by layer.
    """
    from llmc.quantize.quantizer import Observations

    weight_needs, input_needs = quantizer.weight_needs(graph), quantizer.input_needs(graph)
    return Observations(
        None if weight_needs is None else _recall_weights(checkpoint, weight_needs),
        None if input_needs is None else _recall_inputs(checkpoint, input_needs),
    )


def calibrate_weights(checkpoint: Checkpoint, needs: WeightNeeds, progress: Progress) -> Calibration:
    """Quantize tensors of a checkpoint on calibration text, going on where a killed build stopped.

    Raises:
        As `observe`.
    """
    from llmc.quantize.calibrate import Calibrator

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
        )
        return calibrator.run(subject.windows, lambda line: progress.note(f"calibrate: {line}"))

    return walking(work)


def _recall_weights(checkpoint: Checkpoint, needs: WeightNeeds) -> Calibration | None:
    """What `calibrate_weights` gave, if the cache has all of it; None if it does not."""
    from llmc.calibration.walk import finished_files
    from llmc.quantize.calibrate import read_calibration

    subject = _plan(checkpoint, needs.text, "weights", _facts(needs))
    files = finished_files(subject.folder, len(subject.layers))
    return None if files is None else read_calibration(files, needs.schemes)


def _facts(needs: WeightNeeds) -> dict[str, Any]:
    """What the results of a calibration depend on, besides the checkpoint and the text."""
    import numpy as np

    return {
        "scales": np.dtype(needs.scale_type).name,
        "schemes": {name: scheme.model_dump() for name, scheme in sorted(needs.schemes.items())},
        "channels": [[*plan.sources] for plan in needs.channels],
    }


def observe_inputs(
    checkpoint: Checkpoint, text: CalibrationText, plans: Sequence[InputPlan], progress: Progress
) -> Activations:
    """Run the original over calibration text, for the ranges of activations and the peaks of all modules.

    Args:
        plans: Activations that are to be quantized.

    Raises:
        As `observe`.
    """
    from llmc.calibration.walk import LayerWalk
    from llmc.quantize.activations import ActivationTask, read_activations

    tied = dict(checkpoint.tied)

    def work() -> Activations:
        subject = prepare(checkpoint, text, "activations", _input_facts(plans))
        walk = LayerWalk(subject.model, subject.layers, checkpoint.tensors, tied, subject.folder)
        task = ActivationTask(plans, tied, subject.layers, len(subject.windows))
        files = walk.run(subject.windows, task, lambda line: progress.note(f"calibrate: {line}"))
        return read_activations(files)

    return walking(work)


def _recall_inputs(checkpoint: Checkpoint, needs: InputNeeds) -> Activations | None:
    """What `observe_inputs` found, if the cache has all of it; None if it does not."""
    from llmc.calibration.walk import finished_files
    from llmc.quantize.activations import read_activations

    subject = _plan(checkpoint, needs.text, "activations", _input_facts(needs.plans))
    files = finished_files(subject.folder, len(subject.layers))
    return None if files is None else read_activations(files)


def _input_facts(plans: Sequence[InputPlan]) -> dict[str, Any]:
    return {"plans": [[*plan.sources, plan.kind.value, plan.foldable] for plan in plans]}


def look_for_overflow(checkpoint: Checkpoint, dtype: Dtype, progress: Progress) -> Activations:
    """The original's peaks on some text, where the target computes in float16; none where it does not.

    Raises:
        UnsupportedError: A module's results do not fit into float16.
        CheckpointError: Weights or activations that are not finite.
    """
    from llmc.quantize.activations import Activations

    if dtype is not Dtype.FLOAT16:
        return Activations()
    with progress.stage("overflow"):
        try:
            found = observe_inputs(checkpoint, _OVERFLOW_TEXT, (), progress)
        except UnsupportedError as error:
            progress.note(f"overflow: float16's range was not looked at: {error.fact}")
            return Activations()
        require_range(found, dtype, progress)
    return found


def require_range(found: Activations, dtype: Dtype, progress: Progress) -> None:
    """Hold the peaks of a model's modules against the largest number of float16.

    Raises:
        UnsupportedError: Some are larger; they are named.
    """
    if dtype is not Dtype.FLOAT16:
        return
    over = {name: peak for name, peak in found.peaks.items() if peak > _FLOAT16}
    if over:
        worst = sorted(over, key=lambda name: -over[name])
        listed = ", ".join(f"{name} ({over[name]:,.0f})" for name in worst[:_NAMED])
        more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
        raise UnsupportedError(
            f"float16 ends at {_FLOAT16:,.0f}, and on the calibration text larger values come out of "
            f"{listed}{more}",
            hint="use a target in bfloat16, such as tensorrt-bf16, or one in float32",
        )
    name = max(found.peaks, key=lambda n: found.peaks[n])
    peak = found.peaks[name]
    progress.note(
        f"overflow: the largest value on the calibration text is {peak:,.0f}, from {name}; "
        f"float16 ends at {_FLOAT16:,.0f}"
    )


@dataclass(frozen=True)
class PreparedModel:
    """A model to be taken over a text."""

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
    """The model without weights, its text, and where results of this purpose are kept.

    Args:
        shelf: One of those with a limit of their own.
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
    """`prepare` without making the folder."""
    from llmc.checkpoint.skeleton import build_hollow
    from llmc.trace.stamp import find_layers

    tokens, start = tokenize(checkpoint.tokenizer(), calibration_text())
    config = checkpoint.config.get_text_config(decoder=True)
    windows = cut_text(tokens, start, text, getattr(config, "max_position_embeddings", None))
    model = build_hollow(checkpoint.config)
    layers = find_layers(model, checkpoint.config.get_text_config(), stamp=False).names
    if not layers:
        raise UnsupportedError(
            f"{checkpoint.architecture} has no list of decoder layers that could be walked"
        )
    key = calibration_key(checkpoint, purpose, windows, facts, shelf)
    folder = current_folder(default_cache_folder() / shelf) / key
    return PreparedModel(model, layers, windows, folder)


def cut_text(tokens: Any, start: tuple[int, ...], text: CalibrationText, positions: int | None) -> Any:
    """Windows that do not overlap, each after the tokenizer's `start`, (windows, length) int64.

    Args:
        positions: Most tokens of a window that the model takes; None if any number.
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
    """Name of the calibration of these weights on these tokens, for one purpose."""
    known = {
        "checkpoint": checkpoint.digest(),
        "purpose": purpose,
        "facts": dict(facts),
        "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
        "tools": tool_versions(),
        "code": code_digest(*(f"llmc.{package}" for package in _CODE[shelf])),
    }
    return content_key("calibration", known)


def walking(work: Callable[[], Result], shelf: str = "calibration") -> Result:
    """Walk over a model, in temporary folders where the cache has no room for what is kept of it.

    Args:
        work: Calls `prepare` with this shelf.
    """
    return with_working_folders(default_cache_folder() / shelf, work)
