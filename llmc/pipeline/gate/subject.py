"""Define what the gate measures, and load the original to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.backends import backend_of
from llmc.config import Target
from llmc.pipeline.gate.derived import NOTHING, Derived
from llmc.pipeline.gate.rounding import digest_roundings, load_rounded, plan_roundings
from llmc.pipeline.steps.original import is_large, remember
from llmc.pipeline.steps.stored import read_weights
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
    """An artifact to measure, and the original to compare it with.

    Args:
        folder: Folder with model.onnx, genai_config.json and the tokenizer.
        interface: Stated inputs and outputs of the graph.
        target: Target whose gates are checked.
        threads: Intra-op threads of the artifact; None for the runtime's default.
        checkpoint: The original.
        model_digest: Its digest.
        rebuilt: The result of a build here.
        compiled: The checkpoint that was compiled: the original, or the pruned one.
        text: How the artifact turns text into tokens.
        accelerated: The artifact on an accelerator of this machine; None to measure its graph on the CPU.
        tasks: Multiple-choice tasks to answer as well.
        weights: How every matrix is stored.
        seed: Seed for drawing the positions to compare; `seed_of` the artifact's files.
        budget: Seconds of the forecast that decides how many are drawn; None for the default.
        built_otherwise: Why a build here may give another graph; None if it gives the same.
        derived: Differences between the files beside the graph and what a build derives.
        foreign: Whether the original is another model than the compiled one, as forced by the user.
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
        """Return the origin of each weight, by the name of its initializer before quantization."""
        return self.rebuilt.sources

    @property
    def runtime(self) -> str:
        """Return the library that executes the artifact."""
        return self.backend.graph_library if self.accelerated is None else self.accelerated.library

    @property
    def backend(self) -> Backend:
        """Return the backend of the target."""
        return backend_of(self.target)


def open_original(subject: Subject) -> RememberedModel:
    """Open the unmodified original; it is loaded at the first question that the cache cannot answer."""
    checkpoint = subject.checkpoint
    return remember(checkpoint, subject.model_digest, "", lambda: load_original(checkpoint))


def open_compiled(subject: Subject) -> RememberedModel:
    """Open the compiled checkpoint as it is before any pass: the original after pruning."""
    return _remember(subject, "", lambda: load_original(subject.compiled))


def open_own(subject: Subject, original: RememberedModel, weights: WeightParity) -> RememberedModel:
    """Open the original with the artifact's own weights; the original itself if the weights are equal."""
    if not weights.digest and not subject.compiled.altered:
        return original

    def load() -> TorchModel:
        loaded = original.release()
        return _load_own(None if subject.compiled.altered else loaded, subject, weights)

    return _remember(subject, weights.digest, load)


def open_rounding(subject: Subject, own: RememberedModel) -> RememberedModel | None:
    """Open the target's yardstick, if it has one, in the memory of `own`, which is released for it."""
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
    """Load the original, in memory if there is enough, otherwise streamed from disk."""
    return TorchModel(
        checkpoint.stream_reference({}) if is_large(checkpoint) else checkpoint.fill_reference()
    )


def _remember(subject: Subject, weights_digest: str, load: Callable[[], TorchModel]) -> RememberedModel:
    """Call `remember` for the checkpoint that was compiled."""
    digest = f"{subject.model_digest}{subject.compiled.altered}"
    return remember(subject.compiled, digest, weights_digest, load)


def _load_own(loaded: TorchModel | None, subject: Subject, weights: WeightParity) -> TorchModel:
    """Load the original with the artifact's own weights, in `loaded` if that is the original."""
    from llmc.validate.weights import StoredParameters, parameters

    changed = {name: subject.sources[name] for name in weights.changed}
    stored = read_weights(subject.folder, subject.backend, changed)
    if is_large(subject.compiled):
        return TorchModel(subject.compiled.stream_reference(StoredParameters(changed, stored)))
    model = loaded or load_original(subject.compiled)
    for name, matrix in stored.items():
        model.set_parameters(dict(parameters(changed[name], matrix.whole())))
    return model
