"""List the instruction sets that have kernels, and choose the one for a profile."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.errors import UnsupportedError


@dataclass(frozen=True)
class InstructionSet:
    """An instruction set that kernels are compiled for.

    Args:
        machine: Architecture, as `platform.machine` names it on Linux.
        needs: Flags of /proc/cpuinfo that a CPU needs; glue.cpp, which checks at load, uses the same names.
        flags: Compiler flags.
    """

    name: str
    machine: str
    needs: frozenset[str]
    flags: tuple[str, ...]

    @property
    def defines(self) -> tuple[str, ...]:
        """Return the definitions for compiling glue.cpp."""
        return (f"-DLLMC_NEEDS={','.join(sorted(self.needs))}", f'-DLLMC_ISA="{self.name}"')


#: Instruction sets with kernels, from the fastest to the slowest.
INSTRUCTION_SETS = (
    InstructionSet(
        name="AVX-512 VNNI",
        machine="x86_64",
        needs=frozenset(("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c")),
        flags=(
            *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
            *("-mavx512vnni", "-mprefer-vector-width=512"),
        ),
    ),
    InstructionSet(
        name="AVX2",
        machine="x86_64",
        needs=frozenset(("avx2", "fma", "f16c")),
        flags=("-mavx2", "-mfma", "-mf16c"),
    ),
    InstructionSet(
        name="NEON dotprod",
        machine="aarch64",
        needs=frozenset(("asimd", "asimddp")),
        flags=("-mcpu=generic+dotprod",),  # ziglang's clang takes no -march
    ),
)


def choose_isa(isa: Sequence[str], profile: str) -> InstructionSet:
    """Choose the fastest instruction set with kernels that a profile has.

    Raises:
        UnsupportedError: There are no kernels for it.
    """
    for candidate in INSTRUCTION_SETS:
        if candidate.needs <= set(isa):
            return candidate
    names = [candidate.name for candidate in INSTRUCTION_SETS]
    raise UnsupportedError(
        f"there are kernels for {', '.join(names[:-1])} and {names[-1]}, but profile {profile} has "
        f"{', '.join(isa) or 'no instruction set stated'}",
        hint="use a target without compiled kernels, such as cpu-int4",
    )
