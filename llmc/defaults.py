"""Choose the target of a build that names none: the best for the profile's hardware and this machine."""

from dataclasses import dataclass
from pathlib import Path

from llmc.catalog import load_profile
from llmc.errors import LlmcError
from llmc.machine import LOCAL, detect_profile
from llmc.profile import Profile, ProfileKind

#: Compiled kernels decode twice as fast as ONNX Runtime's, and choosing 4 or 8 bits by their effect loses a
#: fifth of what 4 bits everywhere lose at the same size (docs/measurements.md).
_COMPILED, _PLAIN, _GPU = "cpu-mixed-compiled", "cpu-mixed", "cuda-int4"


@dataclass(frozen=True)
class Choice:
    """The target of a build, and a sentence that explains the choice.

    Args:
        otherwise: Target for a model for which kernels cannot do what `target` requires.
    """

    target: str
    reason: str
    otherwise: str | None = None


def choose_target(profile: str, path: Path | None = None) -> Choice:
    """Choose a target for one profile, or for the first of several, which commas separate.

    Args:
        profile: A profile's name; `local` is this machine's CPU.
        path: Folder of the user's own targets and profiles, searched first.

    Raises:
        ConfigError: There is no such profile.
    """
    name = profile.partition(",")[0]
    hardware = detect_profile(gpu=False) if name == LOCAL else load_profile(name, path)
    if hardware.kind is ProfileKind.GPU:
        return Choice(_GPU, f"target {_GPU}, the default for a GPU; llmc targets lists the others")
    lacking = _lacks_kernels(hardware)
    if lacking is None:
        reason = f"target {_COMPILED}, the default where kernels can be compiled"
        return Choice(_COMPILED, reason, otherwise=_PLAIN)
    return Choice(_PLAIN, f"target {_PLAIN}, the default without compiled kernels: {lacking}")


def _lacks_kernels(profile: Profile) -> str | None:
    """Return why no kernels can be compiled for a CPU; None if they can."""
    from llmc.backends.compiled.isa import choose_isa
    from llmc.backends.compiled.toolchain import find_compiler

    try:
        find_compiler(choose_isa(profile.isa, profile.name).machine)
    except LlmcError as error:
        return f"{error.fact} ({error.hint})" if error.hint else error.fact
    return None
