"""Instruction sets that there are kernels for, and which of them a profile has."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.errors import UnsupportedError

#: Domain of the compiled operators.
DOMAIN = "llmc.compiled"


@dataclass(frozen=True)
class InstructionSet:
    """Compiler flags for one instruction set, and the flags of /proc/cpuinfo that a CPU needs for it."""

    name: str
    needs: frozenset[str]
    define: str
    flags: tuple[str, ...]


#: From the fastest to the slowest.
INSTRUCTION_SETS = (
    InstructionSet(
        "AVX-512 VNNI",
        frozenset(("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c")),
        "LLMC_ISA_AVX512",
        (
            *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
            *("-mavx512vnni", "-mprefer-vector-width=512"),
        ),
    ),
    InstructionSet(
        "AVX2", frozenset(("avx2", "fma", "f16c")), "LLMC_ISA_AVX2", ("-mavx2", "-mfma", "-mf16c")
    ),
)


def choose_isa(isa: Sequence[str], profile: str) -> InstructionSet:
    """The fastest instruction set with kernels that a profile has.

    Raises:
        UnsupportedError: There are no kernels for it.
    """
    for known in INSTRUCTION_SETS:
        if known.needs <= set(isa):
            return known
    raise UnsupportedError(
        f"there are kernels for {' and '.join(k.name for k in INSTRUCTION_SETS)}; profile {profile} has "
        f"{', '.join(isa) or 'no instruction set stated'}",
        hint="use a target without compiled kernels, such as cpu-int4",
    )
