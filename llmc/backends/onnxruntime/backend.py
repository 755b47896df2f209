"""Implement the backend of ONNX Runtime's own kernels, on a CPU or on CUDA, served by onnxruntime-genai."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact.manifest import KernelRecord
from llmc.backends.base import Backend, Executable, Generated, Stage
from llmc.config import BuildPlan, Provider, Target
from llmc.errors import ResourceError
from llmc.gpu import Gpu
from llmc.graph.interface import Interface
from llmc.graph.switches import RESTARTING_TYPES
from llmc.profile import Profile
from llmc.progress import Progress
from llmc.runtime.arithmetic import Arithmetic
from llmc.runtime.libraries import CUDA_PROVIDER, require_cuda, require_cuda_for

if TYPE_CHECKING:
    from llmc.artifact.store.folder import Artifact
    from llmc.backends.written import WrittenFrom
    from llmc.graph.model import Graph
    from llmc.quantize.quantizer import Quantizer
    from llmc.runtime.ort_model import OrtModel


@dataclass(frozen=True)
class OrtStage(Stage):
    """A build for ONNX Runtime, which needs only its files.

    Args:
        provider: The execution provider.
        profile: The hardware that is built for.
        gpu: The GPU on which the gates run; None for the CPU, or if this machine has none for the provider.
        obstacle: Why this machine has none.
    """

    provider: Provider
    profile: Profile
    gpu: Gpu | None = None
    obstacle: str | None = None

    @property
    def measurable(self) -> bool:
        """Return whether this machine has the provider's device; it may be another GPU than the profile's."""
        return self.provider is Provider.CPU or self.gpu is not None

    def accelerated(self, artifact: Artifact) -> Executable | None:
        """See `Stage`."""
        return None if self.gpu is None else _executable(artifact, self.gpu)

    def require_graph(self, graph: Graph, checkpoint: WrittenFrom) -> None:
        """See `Stage`; experts that the profile's GPU cannot run are refused."""
        from llmc.backends.onnxruntime.devices import require_expert_kernels

        if self.provider is Provider.CUDA:
            require_expert_kernels(graph, self.profile)

    def lower(self, graph: Graph, folder: Path, progress: Progress) -> KernelRecord | None:
        """See `Stage`."""
        if self.obstacle is not None:
            progress.note(f"the artifact is not executed here: {self.obstacle}")
        for remark in _finish(graph, self.provider):
            progress.note(remark)
        return None


def _finish(graph: Graph, provider: Provider) -> tuple[str, ...]:
    """Convert a graph to its final form, and return what to say of it."""
    from llmc.backends.onnxruntime.cudnn import needs_cudnn
    from llmc.backends.onnxruntime.finish import finish_for_cuda, finish_graph

    if provider is not Provider.CUDA:
        finish_graph(graph, lambda _: None)
        return ()
    obstacle = finish_for_cuda(graph)
    steps = f"steps are launched kernel by kernel, not as one CUDA graph: {obstacle}"
    return tuple(filter(None, (steps if obstacle is not None else None, needs_cudnn(graph.model))))


class OnnxRuntimeBackend(Backend):
    """The backend of ONNX Runtime's own kernels."""

    #: File in the artifact with custom operators that the graph uses; None if there are none.
    library: str | None = None

    def prepare(self, plan: BuildPlan) -> Stage:
        """See `Backend`; a GPU that ONNX Runtime has no code for is refused."""
        provider = plan.target.provider
        if provider is Provider.CPU:
            return OrtStage(provider, plan.profile)
        from llmc.backends.onnxruntime.devices import require_device_kernels

        require_device_kernels(plan.target.name, plan.profile)
        try:
            return OrtStage(provider, plan.profile, require_cuda())
        except ResourceError as error:  # a build needs no GPU
            return OrtStage(provider, plan.profile, obstacle=_reason(error))

    def switch_obstacle(self, target: Target, restart: int | None) -> str | None:
        """See `Backend`."""
        if target.lookup is not None:
            return "a step of drafted tokens would switch before the first of them"
        if restart is not None and restart not in RESTARTING_TYPES:
            lengths = " or ".join(str(n) for n in RESTARTING_TYPES)
            return (
                "there the original's generate recomputes its KV cache, which onnxruntime-genai does only "
                f"beyond {lengths} tokens"
            )
        return None

    def quantizer(self, target: Target) -> Quantizer:
        """See `Backend`."""
        from llmc.quantize.block_quantizer import BlockQuantizer

        return BlockQuantizer.of(target)

    def lower(self, graph: Graph, target: Target) -> Any:
        """See `Backend`."""
        return _finish(graph, target.provider)

    def describe_lowered(self, lowered: Any) -> tuple[str, ...]:
        """See `Backend`."""
        remarks: tuple[str, ...] = lowered
        return remarks

    def write_serving(
        self,
        folder: Path,
        target: Target,
        threads: int | None,
        checkpoint: WrittenFrom,
        generation_config: Any,
        graph: Graph,
    ) -> None:
        """Write genai_config.json."""
        from llmc.backends.onnxruntime.cuda_graph import graph_obstacle
        from llmc.backends.onnxruntime.genai import shares_cache, write_genai_config

        interface = graph.interface()
        cuda = target.provider is Provider.CUDA
        write_genai_config(
            folder,
            checkpoint.config,
            generation_config,
            interface,
            target.provider,
            threads,
            share_cache=shares_cache(graph.model, interface),
            cuda_graph=cuda and graph_obstacle(graph.model, interface) is None,
            library=self.library,
            lookup=target.lookup,
        )

    def require_host(self, artifact: Artifact) -> None:
        """Accept every host: the graph needs only ONNX Runtime."""

    def executable(self, artifact: Artifact) -> Executable:
        """See `Backend`."""
        if artifact.manifest.target.provider is Provider.CUDA:
            return _executable(artifact, require_cuda_for(artifact.path))
        self.require_host(artifact)
        return _executable(artifact, None)

    def accelerated(self, artifact: Artifact, progress: Progress) -> Executable | None:
        """See `Backend`."""
        if artifact.manifest.target.provider is Provider.CPU:
            return None
        try:
            return _executable(artifact, require_cuda())
        except ResourceError as error:
            progress.note(f"measured on the CPU: the graph, not CUDA's kernels: {_reason(error)}")
            return None

    def open_graph(
        self,
        folder: Path,
        interface: Interface,
        target: Target,
        *,
        threads: int | None,
        arithmetic: Arithmetic = Arithmetic.SERVED,
        slots: int | None = None,
    ) -> OrtModel:
        """See `Backend`; the KV cache grows, or has the slots that a prompt reserves."""
        from llmc.runtime.ort_model import OrtModel, shares_buffer

        share = shares_buffer(folder)
        return OrtModel(folder, interface, threads=threads, share_buffer=share, arithmetic=arithmetic)

    def gpu_runtimes(self, capability: str) -> Mapping[str, bool]:
        """See `Backend`; what counts is the installed release."""
        from llmc.runtime.libraries import has_device_code

        has = has_device_code(capability)
        return {} if has is None else {"onnxruntime-gpu": has}

    def generate(
        self,
        artifact: Artifact,
        prompt: str,
        max_tokens: int,
        emit: Callable[[str], None],
        lookup: int | None,
        progress: Progress,
    ) -> Generated:
        """Generate text with onnxruntime-genai."""
        from llmc.backends.onnxruntime.generate import generate_text
        from llmc.backends.onnxruntime.lookup import require_draft, require_rewinding, same_text

        manifest = artifact.manifest
        if lookup is not None:
            require_draft(lookup, compiled=self.library is not None)
            require_rewinding(manifest.interface)
        generated = generate_text(artifact.path, prompt, max_tokens, emit, manifest.text, lookup)
        return generated if lookup is None else replace(generated, same_text=same_text(manifest))

    def describe_measured(self, target: Target, places: Collection[str]) -> str | None:
        """See `Backend`."""
        if target.provider is Provider.CPU:
            return None
        named = (place.partition(f"{CUDA_PROVIDER}, ")[2] for place in places)
        devices = sorted({name.partition(";")[0] for name in named} - {""})
        if devices:
            return f"measured on {' and '.join(devices)}: CUDA's kernels"
        return "measured on the CPU: the graph, not CUDA's kernels"


def _reason(error: ResourceError) -> str:
    """Return the fact of an error, with its hint in parentheses."""
    return error.fact if error.hint is None else f"{error.fact} ({error.hint})"


def _executable(artifact: Artifact, gpu: Gpu | None) -> Executable:
    """Return the artifact on a GPU that `require_cuda` returned, or on the CPU."""
    from llmc.runtime.ort_model import OrtModel, records_graph, shares_buffer

    path, manifest = artifact.path, artifact.manifest
    model = partial(
        OrtModel,
        path,
        manifest.interface,
        threads=manifest.profile.threads or os.cpu_count() or 1,
        share_buffer=shares_buffer(path),
        provider=manifest.target.provider,
    )
    if gpu is None:
        return Executable(model, "onnxruntime")
    ways = [partial(model, chooses=True)]
    if records_graph(path):
        ways.insert(0, partial(model, chooses=True, cuda_graph=True))
    return Executable(model, "onnxruntime", gpu, timed=tuple(ways))
