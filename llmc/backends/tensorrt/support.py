"""Define which TensorRT builds engines for which GPU, and which precision that GPU supports.

All of it is data, checked before anything is built. Facts on TensorRT-RTX were found by building engines with
version 1.7 on a machine without a GPU; those on TensorRT are from NVIDIA's support matrix (TensorRT 10 and
later, "Hardware and Precision"), and none of its engines was built yet.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from llmc.config import BackendName, Dtype, Target, WeightFormat
from llmc.errors import ConfigError, UnsupportedError
from llmc.profile import Profile


class Library(StrEnum):
    """The Python module that builds and runs an engine."""

    RTX = "tensorrt_rtx"
    TENSORRT = "tensorrt"


#: What a pip command for `tensorrt` needs: the package on PyPI downloads from there while it is built.
NVIDIA_INDEX = (
    "--extra-index-url URL, with the URL of NVIDIA's package index (NVIDIA's guide to install TensorRT)"
)

#: Compute capabilities, the preferred library first. TensorRT-RTX builds for them without a GPU; TensorRT
#: builds on the GPU itself.
BUILDS_FOR: dict[Library, tuple[str, ...]] = {
    Library.RTX: ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
    Library.TENSORRT: ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"),
}

#: Capabilities on which TensorRT refuses a precision, or computes in float regardless of how it is stored.
REFUSED_ON: dict[str, tuple[str, ...]] = {
    Dtype.FLOAT16: (),
    Dtype.BFLOAT16: ("7.5",),
    WeightFormat.INT8: ("7.5",),
    WeightFormat.INT4: ("7.5",),
    WeightFormat.FP8: ("7.5", "8.0", "8.6"),
    WeightFormat.NVFP4: ("7.5", "8.0", "8.6", "8.9", "9.0"),
}

#: Capabilities that get a separate engine: NVIDIA's support matrix of TensorRT-RTX says that an engine for
#: Turing and others is slower on the others.
ALONE = ("7.5",)


@dataclass(frozen=True)
class EnginePlan:
    """The plan of an engine.

    Args:
        library: Library that builds and runs it.
        sms: Compute capabilities by TensorRT's names, such as SM89, ascending.
        profiles: Names of the profiles that it serves.
    """

    library: Library
    sms: tuple[str, ...]
    profiles: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the name of the engine's file."""
        return f"{'-'.join(self.sms).lower()}.engine"

    @property
    def partial(self) -> str:
        """Return the name of the file while it is being written."""
        return f".{self.name}.partial"


def precisions_of(target: Target) -> tuple[str, ...]:
    """Return the types in which the target's graph computes and stores, float first."""
    rules = target.engine.weights if target.engine is not None else ()
    formats = dict.fromkeys(rule.scheme.format.value for rule in rules if rule.scheme is not None)
    return (target.dtype.value, *formats)


def plan_engines(
    target: Target, profiles: Sequence[Profile], known: Iterable[Target]
) -> tuple[EnginePlan, ...]:
    """Plan as few engines as the profiles' capabilities allow.

    Args:
        profiles: Profiles that the engines are to run on.
        known: Targets that an error may propose instead.

    Raises:
        ConfigError: A profile states no compute capability.
        UnsupportedError: No TensorRT builds for a profile, or its GPU refuses a precision of the target.
    """
    groups: dict[tuple[Library, str], list[Profile]] = {}
    for profile in profiles:
        capability = profile.compute_capability
        if capability is None:
            raise ConfigError(
                f"profile {profile.name} states no compute capability, but TensorRT builds for one",
                hint="llmc profiles lists the GPUs that engines can be built for, such as rtx-4090",
            )
        library = _library(profile, capability)
        _require_precisions(target, profile, capability, known)
        # TensorRT builds on the GPU itself, for it alone.
        own = capability if library is Library.TENSORRT or capability in ALONE else ""
        groups.setdefault((library, own), []).append(profile)
    return tuple(
        EnginePlan(
            library,
            tuple(sm_of(c) for c in _ascending(p.compute_capability for p in group)),
            tuple(p.name for p in group),
        )
        for (library, _), group in groups.items()
    )


def sm_of(capability: str) -> str:
    """Return TensorRT's name of a compute capability: "8.9" as SM89."""
    return f"SM{capability.replace('.', '')}"


def targets_for(capability: str, known: Iterable[Target]) -> list[str]:
    """Return the names of the targets of which TensorRT builds engines for GPUs of this capability."""
    if not any(capability in capabilities for capabilities in BUILDS_FOR.values()):
        return []
    return [
        target.name
        for target in known
        if target.backend is BackendName.TENSORRT
        and not any(capability in REFUSED_ON[p] for p in precisions_of(target))
    ]


def _library(profile: Profile, capability: str) -> Library:
    for library, capabilities in BUILDS_FOR.items():
        if capability in capabilities:
            return library
    raise UnsupportedError(
        f"no TensorRT builds engines for {profile.device} (compute capability {capability})",
        hint=f"engines exist for {', '.join(_ascending(c for cs in BUILDS_FOR.values() for c in cs))}",
    )


def _require_precisions(target: Target, profile: Profile, capability: str, known: Iterable[Target]) -> None:
    refused = [p for p in precisions_of(target) if capability in REFUSED_ON[p]]
    if not refused:
        return
    others = targets_for(capability, known)
    first = refused[0]
    supporting = [c for c in BUILDS_FOR[Library.TENSORRT] if c not in REFUSED_ON[first]]
    raise UnsupportedError(
        f"target {target.name} needs {first}, which {profile.device} (profile {profile.name}, compute "
        f"capability {capability}) does not support; {', '.join(supporting)} do",
        hint=f"for {profile.name} use {' or '.join(others)}" if others else f"leave {profile.name} out",
    )


def _ascending(capabilities: Iterable[str | None]) -> list[str]:
    distinct = {c for c in capabilities if c is not None}
    return sorted(distinct, key=lambda c: tuple(int(part) for part in c.split(".")))
