"""The parity gate: what `build` runs before it commits an artifact, and `verify` again later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.config import Backend, Gate, Metric, Provider, Target
from llmc.errors import ConfigError, ParityError, ResourceError
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.artifact.interface import Latency, Measurement, Verdict
    from llmc.artifact.store import Artifact
    from llmc.checkpoint import Checkpoint
    from llmc.graph.interface import Interface

LATENCY = frozenset({Metric.TTFT_RATIO, Metric.INTER_TOKEN_RATIO})


@dataclass(frozen=True)
class GateResult:
    """Everything that was measured, and the target's thresholds held against it."""

    measurements: tuple[Measurement, ...]
    verdict: Verdict
    latency: Latency | None = None


def parity_gates(target: Target) -> tuple[Gate, ...]:
    """The target's gates on numbers."""
    return tuple(gate for gate in target.gates if gate.metric not in LATENCY)


def latency_gates(target: Target) -> tuple[Gate, ...]:
    """The target's gates on time."""
    return tuple(gate for gate in target.gates if gate.metric in LATENCY)


def measure_parity(
    folder: Path,
    interface: Interface,
    checkpoint: Checkpoint,
    target: Target,
    threads: int | None,
    eval_text: Path | None,
    progress: Progress,
) -> GateResult:
    """Measure the files in `folder` against the original, and hold the target's parity gates.

    Args:
        folder: model.onnx, genai_config.json and the tokenizer.
        threads: Intra-op threads of the artifact; None leaves them to the runtime.
        eval_text: The user's text; None for the one that ships.

    Raises:
        ConfigError: The text cannot be read.
        ResourceError: A runtime is missing.
    """
    from llmc.data import prompts
    from llmc.validate.gates import evaluate
    from llmc.validate.generation import measure_generation
    from llmc.validate.measure import broken
    from llmc.validate.parity import Parity
    from llmc.validate.quality import measure_quality
    from llmc.validate.reference import TorchModel
    from llmc.validate.session import OrtModel, shares_buffer
    from llmc.validate.static_session import StaticOrtModel

    with progress.stage("load the original"):
        tokenizer = checkpoint.tokenizer()
        tokens, start = tokenize(tokenizer, read_text(eval_text))
        reference = TorchModel(checkpoint.load_reference())
    measurements: list[Measurement] = []
    model: OrtModel | StaticOrtModel
    try:
        if interface.static_cache:
            model = StaticOrtModel(folder, interface, threads=threads)
        else:
            model = OrtModel(folder, interface, threads=threads, share_buffer=shares_buffer(folder))
    except ParityError as error:
        gates = parity_gates(target)
        measurements += broken(tuple(gate.metric for gate in gates), error, "onnxruntime")
        return GateResult(tuple(measurements), evaluate(gates, measurements))
    with progress.stage("parity"):
        measurements += Parity(model, reference, tokens).measure()
    with progress.stage("quality"):
        measurements += measure_quality(model, reference, tokens, start=start)
    if target.backend is Backend.ONNXRUNTIME:
        with progress.stage("generation"):
            measurements += measure_generation(folder, reference, tokenizer, prompts())
    return GateResult(tuple(measurements), evaluate(parity_gates(target), measurements))


def read_text(path: Path | None) -> str:
    """The evaluation text.

    Raises:
        ConfigError: The file is not text in UTF-8, or cannot be read.
    """
    from llmc.data import eval_text

    if path is None:
        return eval_text()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"evaluation text {path} is not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"evaluation text {path} cannot be read: {error.strerror}") from error


def tokenize(tokenizer: Any, text: str) -> tuple[Any, tuple[int, ...]]:
    """Token ids of `text`, (n,) int64, and what the tokenizer puts before any text.

    Raises:
        ConfigError: The text has no tokens.
    """
    import numpy as np

    ids: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ConfigError("the evaluation text is empty", hint="use a text of at least a few hundred words")
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    before = whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)]
    return np.array(ids, dtype=np.int64), tuple(before)


def open_pair(path: Path, against: str | None) -> tuple[Artifact, Checkpoint]:
    """An artifact whose files are intact, and the original it is to be compared with.

    Args:
        against: The original; None for the one that the manifest names.

    Raises:
        ConfigError: There is no artifact, or its files are damaged.
        CheckpointError: The original cannot be opened.
        ResourceError: The artifact cannot run on this machine.
    """
    from llmc.artifact.store import check_files, open_artifact
    from llmc.checkpoint import open_checkpoint

    artifact = open_artifact(path)
    check_files(artifact)
    target = artifact.manifest.target
    if target.provider is not Provider.CPU and not artifact.manifest.interface.static_cache:
        raise ResourceError(
            f"{path} is built for {target.provider.value.upper()}; this command runs it on the CPU",
            hint="gates on a GPU are not supported yet",
        )
    return artifact, open_checkpoint(against or artifact.manifest.model.ref)
