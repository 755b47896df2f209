"""Implement the backend of checkpoints: Hugging Face folders with quantized weights, which servers load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from llmc.artifact.manifest import FileDigest, KernelRecord, Manifest
from llmc.artifact.ranks import RANKS
from llmc.backends.base import Backend, Executable, Generated, Stage
from llmc.backends.checkpoint.description import (
    CONFIG,
    PROCESSORS,
    copy_processors,
    describe_folder,
    write_documents,
)
from llmc.backends.checkpoint.formats.choice import format_of
from llmc.backends.checkpoint.requirements import joined_weights, require_matrices
from llmc.backends.checkpoint.writer import SINGLE, write_tensors
from llmc.backends.special_tokens import GENERATION_CONFIG
from llmc.config import BuildPlan, CacheType, CheckpointFormat, ServedCheckpoint, Target
from llmc.errors import ConfigError, ResourceError, UnsupportedError
from llmc.graph.interface import Interface
from llmc.progress import Progress
from llmc.runtime.arithmetic import Arithmetic
from llmc.servers.support import Matrix, describe_takers
from llmc.servers.support_models import ServedModel

if TYPE_CHECKING:
    from llmc.artifact.store.folder import Artifact
    from llmc.backends.checkpoint.contents import Contents
    from llmc.backends.checkpoint.formats.base import Format
    from llmc.backends.written import WrittenFrom, WrittenTensors
    from llmc.graph.model import Graph
    from llmc.quantize.quantizer import Quantizer
    from llmc.runtime.session import Rewindable

_READER = "compressed-tensors"
_INSTALL = "pip install 'llmc[servers]'"
_BY_SERVERS = "serve the folder by a server, such as vllm serve"


@dataclass(frozen=True)
class CheckpointStage(Stage):
    """The build of a checkpoint, which needs nothing of this machine."""

    target: Target

    @property
    def measurable(self) -> bool:
        """Return True: transformers loads the folder on any CPU."""
        return True

    def require_graph(self, graph: Graph, checkpoint: WrittenFrom) -> None:
        """See `Stage`; matrices that the format cannot hold are refused."""
        _require_cache(graph, self.target, checkpoint)
        require_matrices(graph, self.target, checkpoint)

    def lower(self, graph: Graph, folder: Path, progress: Progress) -> KernelRecord | None:
        """Change nothing: the graph only says which matrices there are, and gives their codes."""
        return None


class CheckpointBackend(Backend):
    """The backend for folders that servers load; transformers executes them for the gates."""

    packages: ClassVar[Mapping[str, str]] = {
        _READER: "transformers reads the folders of targets vllm-* by it; " + _INSTALL,
    }
    served_by_genai = False
    serving_file = GENERATION_CONFIG
    graph_library = "transformers"
    writes_graph = False

    def prepare(self, plan: BuildPlan) -> Stage:
        """See `Backend`; the gates need the library by which transformers reads the folder."""
        by_reader = section_of(plan.target).format is CheckpointFormat.COMPRESSED_TENSORS
        if by_reader and plan.verify and find_spec("compressed_tensors") is None:
            raise ResourceError(
                f"{_READER} is not installed, by which transformers reads what target {plan.target.name} "
                "writes, for the gates",
                hint=f"{_INSTALL}, or build with --no-verify",
            )
        return CheckpointStage(plan.target)

    def switch_obstacle(self, target: Target, restart: int | None) -> str | None:
        """Return None: the folder has the original's configuration, by which a server decides."""
        return None

    def quantizer(self, target: Target) -> Quantizer:
        """See `Backend`."""
        from llmc.quantize.block_quantizer import BlockQuantizer
        from llmc.quantize.engine_quantizer import EngineQuantizer

        section = section_of(target)
        if section.weights:
            return EngineQuantizer(section, target.dtype, for_servers=True)
        return BlockQuantizer.of(target, for_servers=True)

    def joined_products(self, graph: Graph) -> Sequence[Sequence[str]]:
        """See `Backend`; servers join queries, keys and values, and the gate of an MLP with what it gates."""
        return joined_weights(graph)

    def lower(self, graph: Graph, target: Target) -> Any:
        """Change nothing and return None."""
        return None

    def write_model(
        self, graph: Graph, folder: Path, target: Target, checkpoint: WrittenFrom, progress: Progress
    ) -> Mapping[str, FileDigest]:
        """Write the safetensors files."""
        contents = _contents(graph, target, checkpoint)
        if contents.rounded:
            progress.note(
                f"write: {len(contents.rounded)} tensors are stored in another type than they are read in, "
                f"first {contents.rounded[0]}"
            )
        if contents.unused:
            progress.note(
                f"write: {len(contents.unused)} tensors that transformers does not use are copied "
                f"for servers and not verified, first {contents.unused[0]}"
            )
        progress.note(
            f"write: {describe_takers(target, _experts(graph), _served(graph, target, checkpoint))}"
        )
        return write_tensors(contents.tensors, folder, progress.advance)

    def write_serving(
        self,
        folder: Path,
        target: Target,
        threads: int | None,
        checkpoint: WrittenFrom,
        generation_config: Any,
        graph: Graph,
    ) -> None:
        """Write config.json, generation_config.json and the files that the format has beside them."""
        contents = _contents(graph, target, checkpoint)
        documents = describe_folder(_form(target), contents, checkpoint)
        vocabulary = graph.interface().vocabulary
        write_documents(folder, documents, checkpoint.config, generation_config, vocabulary)
        copy_processors(checkpoint.path, folder)

    def serves_by(self, name: str) -> bool:
        """See `Backend`."""
        return name in (GENERATION_CONFIG, CONFIG, "hf_quant_config.json", *PROCESSORS)

    def own_files(self, manifest: Manifest) -> set[str]:
        """See `Backend`."""
        stem, _, suffix = SINGLE.partition(".")
        weights = {name for name in manifest.files if name.startswith(stem) and f".{suffix}" in name}
        return weights | {name for name in manifest.files if name.startswith(f"{RANKS}/")}

    def written_tensors(
        self, graph: Graph, target: Target, checkpoint: WrittenFrom
    ) -> Iterator[WrittenTensors]:
        """See `Backend`."""
        yield from _contents(graph, target, checkpoint).tensors

    def require_host(self, artifact: Artifact) -> None:
        """Accept every host: the folder is read on any CPU."""

    def executable(self, artifact: Artifact) -> Executable:
        """Refuse: a server executes the folder, by its own kernels."""
        _refuse(artifact.path, "time")

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
        """Refuse: the artifact has no graph."""
        _refuse(folder, "open as a graph")

    def generate(
        self,
        artifact: Artifact,
        prompt: str,
        max_tokens: int,
        emit: Callable[[str], None],
        lookup: int | None,
        progress: Progress,
    ) -> Generated:
        """Refuse: a server generates the text."""
        _refuse(artifact.path, "generate text with")


def section_of(target: Target) -> ServedCheckpoint:
    """Return the section `checkpoint` of a target of this backend.

    Raises:
        ConfigError: The target has none.
    """
    if target.checkpoint is None:
        raise ConfigError(f"target {target.name} has no section checkpoint, which backend checkpoint needs")
    return target.checkpoint


def _require_cache(graph: Graph, target: Target, checkpoint: WrittenFrom) -> None:
    """Require that the format and servers have scales for the KV cache, if the target asks for them.

    Raises:
        UnsupportedError: They do not, or the target asks for another type of cache than fp8.
    """
    from llmc.quantize.cache_scales import plan_cache

    if target.kv_cache is None:
        return
    if target.kv_cache is not CacheType.FP8 or target.cache_text is None:
        raise UnsupportedError(
            f"target {target.name} asks for a KV cache in {target.kv_cache.value} "
            f"{'without' if target.cache_text is None else 'on'} a calibration text, and servers have fp8",
            hint="use kv_cache: fp8 with checkpoint.calibration, or leave kv_cache out",
        )
    _form(target)
    plan_cache(graph, checkpoint.config)


def _contents(graph: Graph, target: Target, checkpoint: WrittenFrom) -> Contents:
    from llmc.backends.checkpoint.contents import plan_contents

    return plan_contents(graph, section_of(target), _form(target), checkpoint)


def _form(target: Target) -> Format:
    return format_of(section_of(target), fp8_cache=target.kv_cache is CacheType.FP8)


def _experts(graph: Graph) -> list[Matrix]:
    """Return the stacks of experts that are quantized, for the table of servers."""
    from llmc.backends.checkpoint.coded import stored_experts

    stacks = stored_experts(graph).items()
    return [Matrix(name, (0, 0), stored.scheme, is_expert=True) for name, stored in stacks]


def _served(graph: Graph, target: Target, checkpoint: WrittenFrom) -> ServedModel:
    """Return what servers read of the model that is written."""
    from llmc.backends.checkpoint.coded import coded_matrices

    coded = coded_matrices(graph, section_of(target).format)
    config = checkpoint.config.get_text_config(decoder=True)
    return ServedModel(config, checkpoint.architecture, tuple(each.module for each in coded))


def _refuse(path: Path, what: str) -> NoReturn:
    raise UnsupportedError(
        f"{path} is a checkpoint for servers, which llmc does not {what}", hint=_BY_SERVERS
    )
