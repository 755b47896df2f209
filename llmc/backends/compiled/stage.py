"""Compile kernels in a stage of the build, and check what is needed to load them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.artifact.manifest import KernelRecord, LeftOutside
from llmc.backends.base import Stage
from llmc.backends.compiled.isa import INSTRUCTION_SETS, InstructionSet, choose_isa
from llmc.backends.compiled.toolchain import Compiler, find_compiler, host_machine
from llmc.config import CacheType, Target
from llmc.errors import ResourceError
from llmc.machine import detect_cpu
from llmc.profile import Profile
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.artifact.store.folder import Artifact
    from llmc.backends.compiled.lower import KernelSource
    from llmc.graph.model import Graph


#: Name of the library inside of an artifact.
LIBRARY = "kernels.so"


@dataclass(frozen=True)
class KernelStage(Stage):
    """A compiler and an instruction set, found before any work is done."""

    compiler: Compiler
    isa: InstructionSet
    cache: CacheType

    @classmethod
    def prepare(cls, target: Target, profile: Profile) -> KernelStage:
        """Find the instruction set of the profile's CPU and a compiler for it.

        Raises:
            UnsupportedError: There are no kernels for the profile's CPU.
            ResourceError: There is no compiler.
        """
        isa = choose_isa(profile.isa, profile.name)
        return cls(find_compiler(isa.machine), isa, target.kv_cache or CacheType.FLOAT32)

    @property
    def measurable(self) -> bool:
        """Return whether this machine's CPU can execute the compiled kernels."""
        return _misfit(self.isa) is None

    def lower(self, graph: Graph, folder: Path, progress: Progress) -> KernelRecord:
        """Replace regions of `graph` by operators and write their library into `folder`."""
        from llmc.backends.onnxruntime.finish import finish_graph

        return finish_graph(graph, lambda graph: self._compile(graph, folder, progress))

    def _compile(self, graph: Graph, folder: Path, progress: Progress) -> KernelRecord:
        from llmc.backends.compiled.lower import compile_kernels

        before = len(graph.notes)
        with progress.stage("kernels"):
            compiled = compile_kernels(graph, self.isa, self.compiler, self.cache)
            (folder / LIBRARY).write_bytes(compiled.library)
        progress.note(
            f"kernels: {compiled.regions} regions of {compiled.nodes} operators for {compiled.isa}, "
            f"{compiled.compiler}"
        )
        for note in graph.notes[before:]:
            progress.note(f"kernels: {note}")
        for op, reason, count in compiled.outside:
            progress.note(f"kernels: {count} {op} stay with ONNX Runtime: {reason}")
        return KernelRecord(
            library=LIBRARY,
            isa=compiled.isa,
            compiler=compiled.compiler,
            source=compiled.source,
            regions=compiled.regions,
            nodes=compiled.nodes,
            outside=tuple(LeftOutside(operator=o, reason=r, count=c) for o, r, c in compiled.outside),
        )


def compile_again(record: KernelRecord, source: KernelSource) -> bytes | None:
    """Compile the library of an artifact's kernels here; None if this machine lacks their compiler.

    Args:
        source: The program, which must be the recorded program.
    """
    from llmc.backends.compiled.lower import compile_source

    isa = next((candidate for candidate in INSTRUCTION_SETS if candidate.name == record.isa), None)
    if isa is None:
        return None
    try:
        compiler = find_compiler(isa.machine)
    except ResourceError:
        return None
    return compile_source(source.text, isa, compiler) if compiler.version == record.compiler else None


def require_kernels(artifact: Artifact) -> None:
    """Require that this CPU can execute an artifact's kernels, before it is loaded.

    Raises:
        ResourceError: They are for another architecture, or for instructions that this CPU lacks.
    """
    record = artifact.manifest.kernels
    if record is None:
        return
    isa = next((candidate for candidate in INSTRUCTION_SETS if candidate.name == record.isa), None)
    if isa is None:
        raise ResourceError(
            f"the kernels of {artifact.path} are for {record.isa}, which this version of llmc does not know",
            hint="update llmc, or build the artifact again with this version",
        )
    misfit = _misfit(isa)
    if misfit is not None:
        raise ResourceError(
            f"the kernels of {artifact.path} are compiled for {isa.machine} CPUs with {isa.name}, "
            f"but {misfit}",
            hint="copy it to such a machine, or build it for this one with --profile local",
        )


def _misfit(isa: InstructionSet) -> str | None:
    """Describe this machine if it cannot execute kernels for `isa`."""
    machine, host = host_machine(), detect_cpu()
    if machine != isa.machine:
        return f"this machine is {machine} ({host.device})"
    lacking = sorted(isa.needs - set(host.isa))
    return f"this CPU ({host.device}) lacks {', '.join(lacking)}" if lacking else None
