"""What the pipeline asks of a backend, and the answers that most backends share.

A backend turns a quantized graph into the files of an artifact, and executes them. `llmc.backends.backend_of`
finds the one of a target; nothing outside of `llmc.backends` and `llmc.config` asks which it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact.manifest import FileDigest, KernelRecord, Manifest, State
from llmc.artifact.store.integrity import require_intact
from llmc.config import BuildPlan, Target
from llmc.errors import ConfigError
from llmc.graph.interface import Interface
from llmc.profile import Profile
from llmc.progress import Progress
from llmc.runtime.arithmetic import Arithmetic

if TYPE_CHECKING:
    from llmc.artifact.engine import EngineRecord
    from llmc.artifact.forecast import Forecast
    from llmc.artifact.store.folder import Artifact
    from llmc.graph.model import Graph
    from llmc.quantize.quantizer import Quantizer
    from llmc.runtime.session import Rewindable


@dataclass(frozen=True)
class Made:
    """What a backend wrote beside model.onnx, as the manifest records it.

    Args:
        kernels: The library of compiled kernels.
        engines: TensorRT engines, built or pending.
        files: Digests of the files that are known already.
    """

    kernels: KernelRecord | None = None
    engines: tuple[EngineRecord, ...] = ()
    files: Mapping[str, FileDigest] = field(default_factory=dict)


class Stage(ABC):
    """The backend's part of one build, prepared before any other work: what it needs is there."""

    @property
    @abstractmethod
    def measurable(self) -> bool:
        """Whether this machine can hold the gates of what is built."""

    @abstractmethod
    def lower(self, graph: Graph, folder: Path, progress: Progress) -> KernelRecord | None:
        """Bring a quantized graph into the form that is written, and write what its operators need."""

    def write(self, folder: Path, interface: Interface, progress: Progress) -> Made:
        """Write what is made from model.onnx in `folder`."""
        return Made()

    def state(self, made: Made) -> State:
        """The state of the artifact before any gate was held."""
        return State.NOT_VERIFIED if self.measurable else State.NOT_EXECUTED


class SameText(StrEnum):
    """What the text with drafts being that without them rests on.

    EXACT: a token's numbers are the same bits in a step of several tokens.
    TIES: they differ by the order of summation in float32; two tokens so near to each other are a tie.
    ROUNDED: they differ by the rounding of activations or floats to few bits, which turns near ties.
    """

    EXACT = "exact"
    TIES = "up to ties"
    ROUNDED = "up to rounding"


@dataclass(frozen=True)
class Generated:
    """Text that an artifact made.

    Args:
        tokens: New tokens, without the one that ends the text.
        steps: Runs of the model that chose them.
        drafted: Tokens that prompt lookup drafted.
        accepted: Drafted tokens that the model chose too.
        same_text: What the text being equal to that without lookup rests on; None without lookup.
    """

    tokens: int
    steps: int
    drafted: int = 0
    accepted: int = 0
    same_text: SameText | None = None


@dataclass(frozen=True)
class Executable:
    """An artifact on this machine's hardware.

    Args:
        open: Makes a session; picklable, for processes that measure memory.
        library: The Python module of its runtime.
        weight_bytes: Weights that a decode step reads; None where they are those of model.onnx.
        rows: Most rows of a batch; None for any number.
    """

    open: Callable[[], Rewindable]
    library: str
    weight_bytes: int | None = None
    rows: int | None = None


class Backend(ABC):
    """One way to write and execute an artifact; it has no state."""

    #: Whether one artifact can serve several profiles.
    several_profiles = False
    #: Whether onnxruntime-genai serves the artifact, with its own tokenizer; if not, llmc generates text.
    served_by_genai = True
    #: Whether attention of the served program rounds more than the type of its KV cache says.
    rounds_attention = False

    # -- plan ---------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, plan: BuildPlan) -> Stage:
        """Find what a build needs on this machine, before any work.

        Raises:
            LlmcError: Something is missing, or the profile's hardware cannot have such an artifact.
        """

    def capacity(self, target: Target) -> int | None:
        """Slots of a KV cache of fixed length; None where it grows."""
        return None

    @abstractmethod
    def switch_obstacle(self, target: Target, restart: int | None) -> str | None:
        """Why the artifact cannot follow the original across a switch of its rotary embedding.

        Args:
            restart: Total length beyond which the original computes its KV cache anew; None if never.
        """

    # -- lower and write ----------------------------------------------------------------------------------

    @abstractmethod
    def quantizer(self, target: Target) -> Quantizer:
        """How the target stores weights."""

    @abstractmethod
    def lower(self, graph: Graph, target: Target) -> Any:
        """Bring a quantized graph into the form that is written, without compiling or writing anything.

        Returns:
            What `differences` compares with the artifact; None where there is nothing beside the graph.
        """

    @abstractmethod
    def write_serving(
        self,
        folder: Path,
        target: Target,
        threads: int | None,
        config: Any,
        generation_config: Any,
        graph: Graph,
    ) -> None:
        """Write the file by which a runtime serves the artifact, beside the tokenizer's files in `folder`.

        Args:
            threads: Intra-op threads; None leaves them to the runtime.
            config: transformers configuration of the model.
            generation_config: transformers `GenerationConfig`; None if the checkpoint has none.
            graph: As it is written.

        Raises:
            UnsupportedError: The runtime cannot serve the graph.
        """

    def forecasts(self, target: Target, profiles: Sequence[Profile], made: Manifest) -> tuple[Forecast, ...]:
        """Bounds on latency from data sheets, one for each profile; none where nothing is forecast."""
        return ()

    # -- execute ------------------------------------------------------------------------------------------

    @abstractmethod
    def require_host(self, artifact: Artifact) -> None:
        """Find out whether this machine can load what the graph needs.

        Raises:
            ResourceError: It cannot.
        """

    @abstractmethod
    def executable(self, artifact: Artifact) -> Executable:
        """The artifact on the hardware that it is built for.

        Raises:
            ResourceError: This machine does not have that hardware, or lacks its runtime.
        """

    def accelerated(self, artifact: Artifact, progress: Progress) -> Executable | None:
        """The artifact on an accelerator of this machine, to be measured there.

        Returns:
            None, and a note why, where there is none: the graph is measured on the CPU.
        """
        return None

    @abstractmethod
    def open_graph(
        self,
        folder: Path,
        interface: Interface,
        target: Target,
        *,
        threads: int | None,
        arithmetic: Arithmetic = Arithmetic.SERVED,
        slots: int | None = None,
    ) -> Rewindable:
        """A session of the graph on the CPU.

        Args:
            threads: Intra-op threads; None leaves them to the runtime.
            arithmetic: What it is computed in.
            slots: Slots of a KV cache of fixed length, fewer than the graph's own; None for all.

        Raises:
            ResourceError: onnxruntime is not installed.
            ParityError: onnxruntime cannot load the graph, or it has another interface.
        """

    @abstractmethod
    def generate(
        self,
        artifact: Artifact,
        prompt: str,
        max_tokens: int,
        emit: Callable[[str], None],
        lookup: int | None,
        progress: Progress,
    ) -> Generated:
        """Generate text greedily, as it comes.

        Args:
            emit: Takes each piece of text.
            lookup: Tokens to draft in a step by prompt lookup; None for none.

        Raises:
            ConfigError: So many tokens cannot be drafted.
            UnsupportedError: The artifact cannot verify drafts.
            ResourceError: The runtime or the hardware is missing.
            ParityError: The model fails.
        """

    # -- say what is there --------------------------------------------------------------------------------

    def describe(self, manifest: Manifest) -> list[str]:
        """Lines for a terminal on what was written beside the graph."""
        return []

    def describe_measured(self, manifest: Manifest) -> str | None:
        """What was measured in the place of the artifact itself; None where it was the artifact."""
        return None

    def describe_unexecuted(self, manifest: Manifest) -> str:
        """How an artifact can be measured that this machine could not execute."""
        return "llmc verify runs its graph on the CPU"

    def own_files(self, manifest: Manifest) -> set[str]:
        """Names of the files beside model.onnx that the manifest says a build wrote."""
        return set()

    def differences(self, path: Path, manifest: Manifest, lowered: Any) -> Iterator[str]:
        """What differs of the files beside model.onnx from a build.

        Args:
            path: The artifact.
            lowered: What `lower` gave for the graph that a build makes.
        """
        yield from ()

    # -- commands of one backend --------------------------------------------------------------------------

    def resume(self, artifact: Artifact, progress: Progress) -> Manifest:
        """Build what waits for this machine's hardware.

        Returns:
            The manifest with it.

        Raises:
            ConfigError: Nothing is pending, or the artifact is damaged.
            ResourceError: This machine does not have the hardware.
        """
        require_intact(artifact)
        raise ConfigError(f"{artifact.path} has no engine pending: it is {artifact.manifest.state.value}")

    def node_checker(self, target: Target) -> Any:
        """What `llmc check` asks about every node of a lowered graph.

        Raises:
            ConfigError: The backend has none.
            ResourceError: It is not installed.
        """
        raise ConfigError(
            f"llmc check asks TensorRT, and target {target.name} is of backend {target.backend.value}",
            hint="name a target such as tensorrt-fp16: llmc targets",
        )
