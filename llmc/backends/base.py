"""Define what the pipeline asks of a backend, and the answers that most backends share.

A backend turns a quantized graph into the files of an artifact, and executes them. `llmc.backends.backend_of`
returns a target's backend; code outside of `llmc.backends` and `llmc.config` never asks which one it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmc.artifact.manifest import FileDigest, KernelRecord, Manifest, State
from llmc.config import BuildPlan, Target
from llmc.errors import ConfigError
from llmc.gpu import Gpu
from llmc.graph.interface import Interface
from llmc.profile import Profile
from llmc.progress import Progress
from llmc.runtime.arithmetic import Arithmetic

if TYPE_CHECKING:
    from llmc.artifact.engine import EngineRecord
    from llmc.artifact.forecast import Forecast
    from llmc.artifact.store.folder import Artifact
    from llmc.backends.written import WrittenFrom, WrittenTensors
    from llmc.graph.model import Graph
    from llmc.quantize.quantizer import Quantizer
    from llmc.runtime.session import Rewindable


@dataclass(frozen=True)
class BackendOutput:
    """The files that a backend wrote beside model.onnx; every field but `files` is a field of the manifest.

    Args:
        kernels: The library of compiled kernels.
        engines: TensorRT engines, built or pending.
        files: Digests of files that are already known.
    """

    kernels: KernelRecord | None = None
    engines: tuple[EngineRecord, ...] = ()
    files: Mapping[str, FileDigest] = field(default_factory=dict)

    def records(self) -> dict[str, Any]:
        """Return what the manifest records, by the name of its field."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "files"}


class Stage(ABC):
    """The backend's part of a build, prepared first so that missing requirements show before other work."""

    @property
    @abstractmethod
    def measurable(self) -> bool:
        """Return whether this machine can run the gates of the artifact."""

    def accelerated(self, artifact: Artifact) -> Executable | None:
        """Return the artifact on an accelerator of this machine, for its gates; None if they run on the CPU.

        Args:
            artifact: It is complete except for its gates.
        """
        return None

    def require_graph(self, graph: Graph, checkpoint: WrittenFrom) -> None:  # noqa: B027 - most accept all
        """Require that the artifact can have a graph after its passes, before calibration.

        Args:
            checkpoint: The checkpoint that is compiled.

        Raises:
            UnsupportedError: The profile's hardware cannot run it, or the artifact cannot hold its matrices.
        """

    @abstractmethod
    def lower(self, graph: Graph, folder: Path, progress: Progress) -> KernelRecord | None:
        """Convert a quantized graph to its final form, and write what its operators need."""

    def write(self, folder: Path, interface: Interface, progress: Progress) -> BackendOutput:
        """Write the files that are derived from model.onnx in `folder`."""
        return BackendOutput()

    def state(self, output: BackendOutput) -> State:
        """Return the state of the artifact before any gate has run."""
        return State.NOT_VERIFIED if self.measurable else State.NOT_EXECUTED


class SameText(StrEnum):
    """The reason why the text with drafts equals the text without them.

    EXACT: a token's logits have the same bits in a step of several tokens.
    TIES: they differ by the summation order in float32; two tokens whose logits are that close are a tie.
    ROUNDED: they differ by the rounding of activations or floats to few bits, which can flip near ties.
    """

    EXACT = "exact"
    TIES = "up to ties"
    ROUNDED = "up to rounding"


@dataclass(frozen=True)
class Generated:
    """The text that an artifact generated.

    Args:
        tokens: Number of new tokens, without the token that ends the text.
        steps: Number of model runs that chose them.
        drafted: Number of tokens that prompt lookup drafted.
        accepted: Number of drafted tokens that the model chose too.
        same_text: Why the text equals the text without lookup; None without lookup.
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
        open: Function that opens a session; picklable, for processes that measure memory.
        library: The Python module of its runtime.
        gpu: The GPU that executes it; None for the CPU.
        weight_bytes: Bytes of weights that a decode step reads; None if they are those of model.onnx.
        rows: Largest number of rows of a batch; None for any number.
        timed: Functions that open a session whose `next_tokens` is timed, first the way in which it is
            served; empty if `open` is the only way.
    """

    open: Callable[[], Rewindable]
    library: str
    gpu: Gpu | None = None
    weight_bytes: int | None = None
    rows: int | None = None
    timed: tuple[Callable[[], Rewindable], ...] = ()


class Backend(ABC):
    """A way to write and execute an artifact; it has no state."""

    #: Optional distributions by name, with what `llmc doctor` says where one is missing.
    packages: ClassVar[Mapping[str, str]] = {}
    #: Whether an artifact can serve several profiles.
    several_profiles = False
    #: Whether onnxruntime-genai serves the artifact, with its own tokenizer; if not, llmc generates text.
    served_by_genai = True
    #: The file by which a runtime serves the artifact.
    serving_file = "genai_config.json"
    #: Whether the artifact is a graph, model.onnx. If not, it is a checkpoint: a folder of safetensors that
    #: servers load. Its gates read the folder back and run it in transformers; `open_graph` is not asked.
    writes_graph = True
    #: The Python module with which `open_graph` executes a graph.
    graph_library = "onnxruntime"
    #: Whether attention in the served program rounds more than the type of its KV cache implies.
    rounds_attention = False
    #: Whether `lower` compiles operators of the dialect, which it can decide once weights have their codes.
    compiles_dialect = False

    # -- plan ---------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, plan: BuildPlan) -> Stage:
        """Check what a build needs on this machine, before any work.

        Raises:
            LlmcError: Something is missing, or the profile's hardware cannot have such an artifact.
        """

    def capacity(self, target: Target) -> int | None:
        """Return the number of slots of a KV cache of fixed length; None if it grows."""
        return None

    @abstractmethod
    def switch_obstacle(self, target: Target, restart: int | None) -> str | None:
        """Explain why the artifact cannot reproduce the original across a switch of its rotary embedding.

        Args:
            restart: Total length beyond which the original recomputes its KV cache; None if never.
        """

    def joined_products(self, graph: Graph) -> Sequence[Sequence[str]]:
        """Return the names of the weights of products that the runtime joins, so that they need one scheme.

        Args:
            graph: The graph after its passes, which have joined what this backend joins itself.
        """
        return ()

    # -- lower and write ----------------------------------------------------------------------------------

    @abstractmethod
    def quantizer(self, target: Target) -> Quantizer:
        """Return the quantizer that stores weights as the target states."""

    @abstractmethod
    def lower(self, graph: Graph, target: Target) -> Any:
        """Convert a quantized graph to its final form, without compiling or writing anything.

        Returns:
            The object that `describe_lowered` and `differences` read; None if there is only the graph.
        """

    def describe_lowered(self, lowered: Any) -> tuple[str, ...]:
        """Describe in sentences what `lower` left as it was, and why.

        Args:
            lowered: The result of `lower`.
        """
        return ()

    def refused_nodes(self, target: Target, graph: Graph) -> tuple[str, ...]:
        """Return why the runtime would refuse nodes of a lowered graph; empty if no parser can be asked."""
        return ()

    def write_model(
        self, graph: Graph, folder: Path, target: Target, checkpoint: WrittenFrom, progress: Progress
    ) -> Mapping[str, FileDigest]:
        """Write the model with its weights into `folder`: model.onnx, unless `writes_graph` is False.

        Args:
            graph: The graph in its final form, with lazy weights.
            checkpoint: The checkpoint that was compiled.

        Returns:
            Digests of the files.

        Raises:
            GraphError: A weight is not computed, or differs from its declaration.
            ResourceError: Disk or memory ran out.
        """
        from llmc.backends.model_file import write_model

        return write_model(graph.model, folder, progress.advance)

    @abstractmethod
    def write_serving(
        self,
        folder: Path,
        target: Target,
        threads: int | None,
        checkpoint: WrittenFrom,
        generation_config: Any,
        graph: Graph,
    ) -> None:
        """Write `serving_file`, and others by which a runtime serves the artifact, into `folder`.

        Args:
            folder: Folder that has the tokenizer's files already.
            threads: Intra-op threads; None for the runtime's default.
            checkpoint: The checkpoint that was compiled.
            generation_config: transformers `GenerationConfig`; None if the checkpoint has none.
            graph: The graph in its final form.

        Raises:
            UnsupportedError: The runtime cannot serve the graph.
        """

    def serves_by(self, name: str) -> bool:
        """Return whether `write_serving` writes the file of this name."""
        return name == self.serving_file

    def forecasts(
        self, target: Target, profiles: Sequence[Profile], manifest: Manifest
    ) -> tuple[Forecast, ...]:
        """Return latency bounds from data sheets, one for each profile; empty if nothing is forecast."""
        return ()

    # -- execute ------------------------------------------------------------------------------------------

    @abstractmethod
    def require_host(self, artifact: Artifact) -> None:
        """Check that this machine can load what the graph needs.

        Raises:
            ResourceError: It cannot.
        """

    @abstractmethod
    def executable(self, artifact: Artifact) -> Executable:
        """Return the artifact on the hardware that it is built for.

        Raises:
            ResourceError: This machine does not have that hardware, or lacks its runtime.
        """

    def accelerated(self, artifact: Artifact, progress: Progress) -> Executable | None:
        """Return the artifact on an accelerator of this machine, to be measured there.

        Returns:
            None, with a note that states why, if there is none: then the graph is measured on the CPU.
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
        """Open a session of the graph on the CPU.

        Args:
            threads: Intra-op threads; None for the runtime's default.
            arithmetic: Arithmetic of the computation.
            slots: Slots of a KV cache of fixed length, fewer than the graph has; None for all.

        Raises:
            ResourceError: The library is not installed.
            ParityError: The library cannot load the graph, or it has another interface.
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
        """Generate text greedily and emit it piece by piece.

        Args:
            emit: Receives each piece of text.
            lookup: Number of tokens to draft in a step by prompt lookup; None for no lookup.

        Raises:
            ConfigError: So many tokens cannot be drafted.
            UnsupportedError: The artifact cannot verify drafts.
            ResourceError: The runtime or the hardware is missing.
            ParityError: The model fails.
        """

    def gpu_runtimes(self, capability: str) -> Mapping[str, bool]:
        """Return the runtimes of its artifacts on GPUs, and whether each can use one of this capability."""
        return {}

    # -- describe -----------------------------------------------------------------------------------------

    def describe(self, manifest: Manifest) -> list[str]:
        """Return lines for a terminal on the files written beside the graph."""
        return []

    def describe_measured(self, target: Target, places: Collection[str]) -> str | None:
        """Describe what was executed to measure an artifact; None if only the CPU that it is built for can.

        Args:
            places: Where its measurements were taken.
        """
        return None

    def describe_unexecuted(self, manifest: Manifest) -> str:
        """Describe how to measure an artifact that this machine could not execute."""
        return "llmc verify runs its graph on the CPU"

    def own_files(self, manifest: Manifest) -> set[str]:
        """Return the names of the files beside model.onnx that a build wrote according to the manifest."""
        return set()

    def written_tensors(
        self, graph: Graph, target: Target, checkpoint: WrittenFrom
    ) -> Iterator[WrittenTensors]:
        """Yield the tensors that a build writes into the safetensors files of a checkpoint artifact.

        `llmc verify` computes them again and compares them with the files, bit for bit.

        Args:
            graph: The quantized graph, with lazy weights.
            checkpoint: The checkpoint that was compiled.
        """
        yield from ()

    def differences(self, path: Path, manifest: Manifest, lowered: Any) -> Iterator[str]:
        """Describe how the files beside model.onnx differ from those of a build.

        Args:
            path: The artifact.
            lowered: The result of `lower` for the graph of a build.
        """
        yield from ()

    # -- commands of one backend --------------------------------------------------------------------------

    def unfinished_files(self, manifest: Manifest) -> set[str]:
        """Names of files, whole or not, that a `resume` leaves if it ends before it records them."""
        return set()

    def resume(self, artifact: Artifact, progress: Progress) -> Manifest:
        """Build what is pending for this machine's hardware.

        Args:
            artifact: It is intact.

        Returns:
            The manifest with it.

        Raises:
            ConfigError: Nothing is pending.
            ResourceError: This machine does not have the hardware.
        """
        raise ConfigError(f"{artifact.path} has no engine pending: it is {artifact.manifest.state.value}")

    def node_checker(self, target: Target) -> Any:
        """Return the checker with which `llmc check` asks about every node of a lowered graph.

        Raises:
            ConfigError: The backend has none.
            ResourceError: It is not installed.
        """
        raise ConfigError(
            f"llmc check asks TensorRT, but target {target.name} is of backend {target.backend.value}",
            hint="name a target such as tensorrt-fp16: llmc targets",
        )
