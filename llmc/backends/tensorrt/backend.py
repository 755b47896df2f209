"""Implement the backend of TensorRT and TensorRT-RTX: engines for kinds of GPUs, built from model.onnx."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmc.artifact.manifest import KernelRecord, Manifest, State
from llmc.artifact.store.codec import TextCodec
from llmc.backends.base import Backend, BackendOutput, Executable, Generated, Stage
from llmc.backends.special_tokens import GENERATION_CONFIG, read_stop_tokens, write_generation_config
from llmc.backends.tensorrt.engines import (
    plan_all_engines,
    require_engine,
    resume_engines,
    unfinished_files,
    write_engines,
)
from llmc.backends.tensorrt.forecast import forecast
from llmc.backends.tensorrt.support import BUILDS_FOR, NVIDIA_INDEX, EnginePlan, Library
from llmc.config import BuildPlan, Engine, Target
from llmc.errors import ConfigError, ResourceError, UnsupportedError, number_ranges
from llmc.gpu import require_gpu
from llmc.graph.interface import Interface
from llmc.machine import detect_profile
from llmc.profile import Profile
from llmc.progress import Progress
from llmc.runtime.arithmetic import Arithmetic
from llmc.runtime.greedy import stream_text

if TYPE_CHECKING:
    from llmc.artifact.engine import EngineRecord
    from llmc.artifact.forecast import Forecast
    from llmc.artifact.store.folder import Artifact
    from llmc.backends.tensorrt.nodes import NodeChecker
    from llmc.backends.tensorrt.session import EngineSession
    from llmc.backends.written import WrittenFrom
    from llmc.graph.model import Graph
    from llmc.quantize.quantizer import Quantizer
    from llmc.runtime.static_session import StaticSession


@dataclass(frozen=True)
class EngineStage(Stage):
    """The engines of a build, each with a library that builds it here or on its GPU."""

    target: Target
    plans: tuple[EnginePlan, ...]

    @property
    def measurable(self) -> bool:
        """Return whether engines are planned; the gate then measures their graph on the CPU."""
        return bool(self.plans)

    def lower(self, graph: Graph, folder: Path, progress: Progress) -> KernelRecord | None:
        """Change nothing: passes and quantization already create the graph that TensorRT parses."""
        return None

    def write(self, folder: Path, interface: Interface, progress: Progress) -> BackendOutput:
        """Build the engines."""
        engines, files = write_engines(folder, self.target, interface, self.plans, progress)
        return BackendOutput(engines=engines, files=files)

    def state(self, output: BackendOutput) -> State:
        """See `Stage`; engines are not executed."""
        pending = any(engine.file is None for engine in output.engines)
        return State.ENGINE_PENDING if pending else State.NOT_EXECUTED


class TensorRtBackend(Backend):
    """The backend for engines with a KV cache of fixed length; llmc generates text with them."""

    packages: ClassVar[Mapping[str, str]] = {
        "tensorrt-rtx-cu13": "targets tensorrt-* need it; it exists for x86-64 only",
        "tensorrt": "it finishes engines on H100, H200 and B200; pip install 'llmc[tensorrt]' "
        + NVIDIA_INDEX,
        "cuda-bindings": "it executes TensorRT engines; pip install 'llmc[gpu]'",
    }
    several_profiles = True
    served_by_genai = False
    serving_file = GENERATION_CONFIG

    def prepare(self, plan: BuildPlan) -> Stage:
        """See `Backend`."""
        return EngineStage(plan.target, plan_all_engines(plan.target, (plan.profile, *plan.also)))

    def capacity(self, target: Target) -> int | None:
        """See `Backend`."""
        return _engine_of(target).kv_capacity

    def switch_obstacle(self, target: Target, restart: int | None) -> str | None:
        """See `Backend`."""
        return "an engine runs a long prompt in pieces, and the first would not know how long the prompt is"

    def quantizer(self, target: Target) -> Quantizer:
        """See `Backend`."""
        from llmc.quantize.engine_quantizer import EngineQuantizer

        return EngineQuantizer(_engine_of(target), target.dtype)

    def lower(self, graph: Graph, target: Target) -> Any:
        """Change nothing and return None: nothing is left to lower."""
        return None

    def write_serving(
        self,
        folder: Path,
        target: Target,
        threads: int | None,
        checkpoint: WrittenFrom,
        generation_config: Any,
        graph: Graph,
    ) -> None:
        """Write generation_config.json."""
        write_generation_config(folder, checkpoint.config, generation_config, graph.interface().vocabulary)

    def forecasts(
        self, target: Target, profiles: Sequence[Profile], manifest: Manifest
    ) -> tuple[Forecast, ...]:
        """See `Backend`."""
        phases = (phase for engine in manifest.engines for phase in engine.phases)
        scratch = max((phase.scratch_bytes or 0 for phase in phases), default=0)
        engine = _engine_of(target)
        return tuple(forecast(manifest.interface, manifest.weights, engine, p, scratch) for p in profiles)

    def require_host(self, artifact: Artifact) -> None:
        """Accept every host: the graph needs only ONNX Runtime."""

    def executable(self, artifact: Artifact) -> Executable:
        """See `Backend`."""
        record, session = _session_of(artifact)
        eager, rows = partial(session, eager=True), _engine_of(artifact.manifest.target).batch.most
        return Executable(eager, record.library, require_gpu(), record.weight_bytes or 0, rows)

    def accelerated(self, artifact: Artifact, progress: Progress) -> Executable | None:
        """See `Backend`."""
        if not artifact.manifest.engines:
            return None
        try:
            return self.executable(artifact)
        except ResourceError as error:
            progress.note(f"the graph is measured on the CPU instead of an engine: {error.fact}")
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
    ) -> StaticSession:
        """See `Backend`; in served arithmetic, a prompt is run in pieces of the engine's size."""
        from llmc.runtime.static_ort_model import StaticOrtModel

        exact = arithmetic is not Arithmetic.SERVED
        most = None if exact else _engine_of(target).prefill.most
        return StaticOrtModel(folder, interface, threads=threads, most=most, exact=exact, slots=slots)

    def generate(
        self,
        artifact: Artifact,
        prompt: str,
        max_tokens: int,
        emit: Callable[[str], None],
        lookup: int | None,
        progress: Progress,
    ) -> Generated:
        """Generate text with the engine of this machine's GPU."""
        path = artifact.path
        if lookup is not None:
            raise UnsupportedError(
                f"{path} is a TensorRT engine: it has only the logits of the last token, which cannot "
                "verify a draft",
                hint="run it without --lookup",
            )
        _, opened = _session_of(artifact)
        session, codec, stop = opened(), TextCodec(path, artifact.manifest.text), read_stop_tokens(path)
        tokens = stream_text(session, codec, prompt, max_tokens, stop, emit)
        for note in session.notes:
            progress.note(note)
        return Generated(tokens, tokens)

    def gpu_runtimes(self, capability: str) -> Mapping[str, bool]:
        """See `Backend`."""
        return {library.value: capability in builds for library, builds in BUILDS_FOR.items()}

    def describe(self, manifest: Manifest) -> list[str]:
        """Describe each engine on a line: its purpose, its size and kernels, or what it is pending for."""
        lines = []
        for engine in manifest.engines:
            sms, profiles = ", ".join(engine.sms), ", ".join(engine.profiles)
            if engine.file is None:
                lines.append(
                    f"  {sms} ({profiles}): pending, llmc build --resume on that GPU with {engine.library}"
                )
                continue
            size = manifest.files[engine.file].bytes / 1e6
            counts = (
                f"{phase.name} {'unknown' if (n := phase.layers_per_decoder_layer) is None else n}"
                for phase in engine.phases
            )
            lines.append(
                f"  {sms} ({profiles}): {size:.0f} MB, {engine.library} {engine.version}, "
                f"layers per decoder layer: {', '.join(counts)}"
            )
            if engine.doubt is not None:
                lines.append(f"    in doubt: {engine.doubt}")
        return lines

    def describe_measured(self, target: Target, places: Collection[str]) -> str | None:
        """See `Backend`."""
        executed = sorted(place for place in places if place.startswith(tuple(Library)))
        if executed:
            return f"measured on the engine: {executed[0]}; the parity levels on its graph, on the CPU"
        return "measured on the graph that the engines are built from, on the CPU; no engine was executed"

    def own_files(self, manifest: Manifest) -> set[str]:
        """See `Backend`."""
        files = (file for engine in manifest.engines for file in (engine.file, engine.context))
        return {file for file in files if file is not None}

    def unfinished_files(self, manifest: Manifest) -> set[str]:
        """See `Backend`."""
        return unfinished_files(manifest)

    def resume(self, artifact: Artifact, progress: Progress) -> Manifest:
        """Build the engines that are pending for this machine's GPU."""
        return resume_engines(artifact, progress)

    def refused_nodes(self, target: Target, graph: Graph) -> tuple[str, ...]:
        """See `Backend`."""
        report = self.node_checker(target).check(graph.model)
        return tuple(
            f"{each.count} x {each.operator}"
            + (f", layers {number_ranges(each.layers)}" if each.layers else "")
            + f": {each.reason}"
            for each in report.refused
        )

    def node_checker(self, target: Target) -> NodeChecker:
        """Return the parser of TensorRT-RTX."""
        from llmc.backends.tensorrt.nodes import NodeChecker

        return NodeChecker(Library.RTX)


def _session_of(artifact: Artifact) -> tuple[EngineRecord, partial[EngineSession]]:
    """Return the engine of this machine's GPU, and a function that opens a session of it.

    Raises:
        ResourceError: The artifact has no engine that this machine can load.
    """
    from llmc.backends.tensorrt.session import EngineSession

    manifest = artifact.manifest
    record = require_engine(manifest.engines, detect_profile())
    digest = manifest.files[str(record.file)].sha256
    return record, partial(EngineSession, artifact.path, record, manifest.interface, digest=digest)


def _engine_of(target: Target) -> Engine:
    """Return the section `engine` of a target of this backend.

    Raises:
        ConfigError: The target has none.
    """
    if target.engine is None:
        raise ConfigError(f"target {target.name} has no section engine, which backend tensorrt needs")
    return target.engine
