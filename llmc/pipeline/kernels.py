"""The stage that compiles kernels: only for targets that ask for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.config import Profile, Target
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.artifact.manifest import KernelRecord
    from llmc.backends.compiled.isa import InstructionSet
    from llmc.backends.toolchain import Compiler
    from llmc.graph.model import Graph


@dataclass(frozen=True)
class KernelStage:
    """A compiler and the instruction set to compile for, found before any work is done."""

    compiler: Compiler
    isa: InstructionSet

    @classmethod
    def prepare(cls, target: Target, profile: Profile) -> KernelStage | None:
        """None for a target without compiled kernels.

        Raises:
            UnsupportedError: There are no kernels for the profile's CPU.
            ResourceError: There is no compiler.
        """
        from llmc.backends.compiled.isa import choose_isa
        from llmc.backends.toolchain import find_compiler

        if target.kernels != "compiled":
            return None
        isa = choose_isa(profile.isa, profile.name)
        return cls(find_compiler(), isa)

    def run(self, graph: Graph, folder: Path, progress: Progress) -> KernelRecord:
        """Replace regions of `graph` by operators and write their library into `folder`."""
        from llmc.artifact.manifest import KernelRecord, LeftOutside
        from llmc.backends.compiled.lower import LIBRARY, compile_kernels

        with progress.stage("kernels"):
            made = compile_kernels(graph, self.isa, self.compiler)
            (folder / LIBRARY).write_bytes(made.library)
        progress.note(
            f"kernels: {made.regions} regions of {made.nodes} operators for {made.isa}, {made.compiler}"
        )
        for op, reason, count in made.outside:
            progress.note(f"kernels: {count} {op} stay with ONNX Runtime: {reason}")
        return KernelRecord(
            library=LIBRARY,
            isa=made.isa,
            compiler=made.compiler,
            source=made.source,
            regions=made.regions,
            nodes=made.nodes,
            outside=tuple(LeftOutside(operator=o, reason=r, count=c) for o, r, c in made.outside),
        )
