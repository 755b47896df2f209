"""Calibration within a build: the text that ships, the model layer by layer, what is kept between builds."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.config import CalibrationText, Dtype, WeightScheme
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.checkpoint import Checkpoint
    from llmc.quantize.calibrate import Calibration

#: Calibrations kept on disk, finished or not; the oldest go.
_KEPT = 3


def calibrate(
    checkpoint: Checkpoint,
    text: CalibrationText,
    dtype: Dtype,
    schemes: Mapping[str, WeightScheme],
    progress: Progress,
) -> Calibration:
    """Quantize tensors of a checkpoint on calibration text, going on where a killed build stopped.

    Args:
        schemes: How each tensor is to be quantized.

    Raises:
        ConfigError: Too little text for the model.
        CheckpointError: Weights or activations that are not finite.
    """
    import numpy as np

    from llmc.checkpoint.skeleton import build_hollow
    from llmc.data import calibration_text
    from llmc.pipeline.gate import tokenize
    from llmc.quantize.calibrate import Calibrator
    from llmc.trace.stamp import find_layers

    tokens, start = tokenize(checkpoint.tokenizer(), calibration_text())
    windows = cut_text(tokens, start, text)
    model = build_hollow(checkpoint.config)
    layers = find_layers(model, checkpoint.config.get_text_config(), stamp=False).names
    folder = calibration_folder(checkpoint, dtype, schemes, windows)
    _make_room(folder)
    scale_type = np.float32 if dtype is Dtype.FLOAT32 else np.float16
    tied = dict(checkpoint.tied)
    calibrator = Calibrator(model, layers, checkpoint.tensors, tied, schemes, scale_type, folder)
    return calibrator.run(windows, lambda line: progress.note(f"calibrate: {line}"))


def cut_text(tokens: Any, start: tuple[int, ...], text: CalibrationText) -> Any:
    """Windows that do not overlap, each after what the tokenizer puts before a text, (windows, length) int64."""
    import numpy as np

    length = min(text.window_tokens - len(start), len(tokens))
    count = max(1, min(text.max_windows, len(tokens) // length))
    rows = [[*start, *tokens[i * length : (i + 1) * length]] for i in range(count)]
    return np.array(rows, np.int64)


def calibration_folder(
    checkpoint: Checkpoint, dtype: Dtype, schemes: Mapping[str, WeightScheme], windows: Any
) -> Path:
    """Where the calibration of these weights, schemes and tokens is kept."""
    from llmc.artifact.cache import content_key, default_cache_folder
    from llmc.artifact.provenance import tool_versions
    from llmc.pipeline.compile import code_digest

    facts = {
        "checkpoint": checkpoint.digest(),
        "dtype": dtype.value,
        "schemes": {name: scheme.model_dump() for name, scheme in sorted(schemes.items())},
        "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
        "tools": tool_versions(),
        "code": code_digest("llmc.quantize"),
    }
    return default_cache_folder() / "calibration" / content_key("calibration", facts)


def _make_room(folder: Path) -> None:
    """Make `folder`, and remove the oldest beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted((p for p in folder.parent.iterdir() if p != folder), key=lambda p: p.stat().st_mtime_ns)
    for old in others[: max(0, len(others) - _KEPT + 1)]:
        shutil.rmtree(old)
