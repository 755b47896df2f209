"""What the gate measures, and how the original is loaded to be held against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.backends import backend_of
from llmc.config import Target
from llmc.memory import available_memory
from llmc.pipeline.gate.derived import NOTHING, Derived
from llmc.pipeline.gate.rounding import digest_roundings, load_rounded, plan_roundings
from llmc.pipeline.steps.original import remember
from llmc.validate.reference import TorchModel

if TYPE_CHECKING:
    from llmc.artifact.manifest import WeightRecord
    from llmc.artifact.text import TextRecord
    from llmc.backends.base import Backend, Executable
    from llmc.checkpoint import Checkpoint
    from llmc.graph.interface import Interface
    from llmc.graph.weights import Rows
    from llmc.pipeline.steps.rebuild import Rebuilt
    from llmc.validate.remembered import RememberedModel
    from llmc.validate.tasks import Tasks
    from llmc.validate.weights import WeightParity


@dataclass(frozen=True)
class Subject:
    """What is measured, and against what.

    Args:
        folder: model.onnx, genai_config.json and the tokenizer.
        interface: What the graph is said to take and give.
        target: Whose gates are held.
        threads: Intra-op threads of the artifact; None leaves them to the runtime.
        checkpoint: The original.
        model_digest: Its digest.
        rebuilt: What a build gives here.
        compiled: What was compiled: the original, or what pruning left of it.
        text: How the artifact turns text into tokens.
        accelerated: The artifact on an accelerator of this machine; None measures its graph on the CPU.
        tasks: Multiple-choice tasks to answer as well.
        weights: How every matrix is stored.
        seed: By which the positions to look at are drawn; `seed_of` the artifact's files.
        budget: Seconds of the forecast that decides how many are drawn; None for the usual.
        built_otherwise: Why a build here may give another graph; None where it gives the same.
        derived: What of the files beside the graph is not what a build derives.
        foreign: Whether the original is another model than the one that was compiled, as the user forced.
    """

    folder: Path
    interface: Interface
    target: Target
    threads: int | None
    checkpoint: Checkpoint
    model_digest: str
    rebuilt: Rebuilt
    compiled: Checkpoint
    text: TextRecord
    accelerated: Executable | None = None
    tasks: Tasks | None = None
    weights: Sequence[WeightRecord] = ()
    seed: int = 0
    budget: float | None = None
    built_otherwise: str | None = None
    derived: Derived = NOTHING
    foreign: bool = False

    @property
    def sources(self) -> Mapping[str, Rows]:
        """What each weight is made of, by the name of its initializer before quantization."""
        return self.rebuilt.sources

    @property
    def runtime(self) -> str:
        """The library that executes it."""
        return "onnxruntime" if self.accelerated is None else self.accelerated.library

    @property
    def backend(self) -> Backend:
        """The backend of the target."""
        return backend_of(self.target)


def open_original(subject: Subject) -> RememberedModel:
    """The original as it is, loaded at the first question that the cache cannot answer."""
    checkpoint = subject.checkpoint
    return remember(checkpoint, subject.model_digest, "", lambda: load_original(checkpoint))


def open_compiled(subject: Subject) -> RememberedModel:
    """What was compiled, as it is before any pass: the original without what pruning left out."""
    return _remember(subject, "", lambda: load_original(subject.compiled))


def open_own(subject: Subject, original: RememberedModel, weights: WeightParity) -> RememberedModel:
    """The original with the artifact's own weights; the original itself where nothing was lost."""
    if not weights.digest and not subject.compiled.altered:
        return original

    def load() -> TorchModel:
        loaded = original.release()
        return _load_own(None if subject.compiled.altered else loaded, subject, weights)

    return _remember(subject, weights.digest, load)


def open_rounding(subject: Subject, own: RememberedModel) -> RememberedModel | None:
    """The yardstick of the target, if it has one, in the memory of `own`, which is released for it."""
    plans = plan_roundings(subject.target, subject.weights, subject.sources)
    if not plans:
        return None

    def load() -> TorchModel:
        loaded = own.release()
        if is_large(subject.compiled):
            return load_rounded(None, subject.compiled, subject.sources, plans)
        return load_rounded(
            loaded or load_original(subject.compiled), subject.compiled, subject.sources, plans
        )

    return _remember(subject, digest_roundings(plans), load)


def load_original(checkpoint: Checkpoint) -> TorchModel:
    """The original, in memory if there is room for it, else streamed from disk."""
    return TorchModel(
        checkpoint.stream_reference({}) if is_large(checkpoint) else checkpoint.fill_reference()
    )


def is_large(checkpoint: Checkpoint) -> bool:
    """Whether the original in float32 would take more than half of the memory that is free."""
    free = available_memory()
    return free is not None and checkpoint.reference_bytes() > free // 2


def _remember(subject: Subject, weights_digest: str, load: Callable[[], TorchModel]) -> RememberedModel:
    """`remember` for what was compiled."""
    digest = f"{subject.model_digest}{subject.compiled.altered}"
    return remember(subject.compiled, digest, weights_digest, load)


def _load_own(loaded: TorchModel | None, subject: Subject, weights: WeightParity) -> TorchModel:
    """The original with the artifact's own weights, put into `loaded` if that is the original."""
    from llmc.validate.stored import read_stored
    from llmc.validate.weights import StoredParameters, parameters

    changed = {name: subject.sources[name] for name in weights.changed}
    stored = read_stored(subject.folder, changed)
    if is_large(subject.compiled):
        return TorchModel(subject.compiled.stream_reference(StoredParameters(changed, stored)))
    model = loaded or load_original(subject.compiled)
    for name, matrix in stored.items():
        model.set_parameters(dict(parameters(changed[name], matrix.whole())))
    return model
