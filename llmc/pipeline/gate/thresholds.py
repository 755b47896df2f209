"""Which thresholds an artifact is held to: those that ship or that the user names, never the artifact's own.

The manifest says what the artifact was built for. Its gates are compared with those of the target of that
name; an artifact that sets another bar than its target misses `gates.mismatches`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc import __version__
from llmc.catalog import find_target, read_target
from llmc.config import Family, Gate, Metric, Target
from llmc.errors import ParityError
from llmc.validate.measure import mismatches

if TYPE_CHECKING:
    from llmc.artifact.manifest import Manifest
    from llmc.artifact.verdict import Measurement

_WHERE = "json, from the files"
_GATE = Gate(metric=Metric.GATES, max=0, reason="an artifact does not set the bar that it is held to")
_FILES = Gate(
    metric=Metric.FILES, max=0, reason="a file that the manifest does not describe was not built with it"
)
_OWN = "--allow-own-gates takes those of the artifact"


@dataclass(frozen=True)
class Thresholds:
    """The bar for one artifact.

    Args:
        target: What the artifact was built for by its manifest, with the gates that are held.
        compared: How many of the artifact's own gates are not those of its target.
        hint: What the user can do about a difference.
    """

    target: Target
    compared: Measurement
    hint: str | None = None

    @property
    def missed(self) -> bool:
        """Whether the artifact's gates differ, and the user did not allow it."""
        return bool(self.compared.value) and any(g.metric is Metric.GATES for g in self.target.gates)

    def are_own(self, manifest: Manifest) -> bool:
        """Whether the gates that are held are those that the artifact was built for."""
        of_files = (Metric.GATES, Metric.FILES)
        held, own = (
            Counter(_bound(gate) for gate in target.gates if gate.metric not in of_files)
            for target in (self.target, manifest.target)
        )
        return held == own and not self.missed

    def require(self) -> None:
        """Refuse an artifact whose own gates differ.

        Raises:
            ParityError: They do, and the user did not allow it.
        """
        if self.missed:
            raise ParityError(f"the gates of the artifact differ: {self.compared.detail}", hint=self.hint)


def choose_thresholds(
    manifest: Manifest, named: str | None, path: Path | None, *, own: bool, latency: bool = False
) -> Thresholds:
    """The gates that an artifact is held to.

    Args:
        named: Target whose gates the user wants, by name or YAML file; None for the one that the manifest
            names.
        path: The user's folder of targets, searched before what ships.
        own: Let the artifact's own gates differ, and hold them where no target is named.
        latency: Compare the gates on time alone.

    Raises:
        ConfigError: There is no target of the name that the user gives, or its file is not valid.
    """
    stated = manifest.target
    known = find_target(stated.name, path) if named is None else read_target(named, path)
    if known is None:
        hint = f"--target FILE names the file of target {stated.name}; {_OWN}"
        told = f"there is no target {stated.name} to take the gates from"
        return _conclude(stated, [told], own, hint, "its own are held" if own else "")
    if known.name != stated.name:
        told = f"those of {known.name}, as asked; the artifact is built for {stated.name}"
        return _conclude(stated.model_copy(update={"gates": known.gates}), [], own, None, told)
    found = _differences(_kept(stated.gates, latency), _kept(known.gates, latency), known.name)
    held = stated if own and named is None else stated.model_copy(update={"gates": known.gates})
    hint = f"build it again with this llmc, {__version__}; it is of {manifest.llmc_version}; {_OWN}"
    told = "its own are held" if own and named is None else f"those of {known.name}"
    if parts := _parts(stated, known):
        told += f"; the artifact was built with another {' and '.join(parts)}"
    return _conclude(held, found, own, hint, told)


def given_thresholds(target: Target) -> Thresholds:
    """The gates of the target that a build was given."""
    return Thresholds(target, mismatches(Metric.GATES, (), f"those of {target.name}", "the build's target"))


def _conclude(target: Target, found: Sequence[str], own: bool, hint: str | None, told: str) -> Thresholds:
    compared = mismatches(Metric.GATES, found, told, _WHERE)
    if found and told:
        compared = compared.model_copy(update={"detail": f"{compared.detail}; {told}"})
    gates = [gate for gate in target.gates if gate.metric is not Metric.GATES]
    gates += [_FILES] if all(gate.metric is not Metric.FILES for gate in gates) else []
    gates = gates if own else [_GATE, *gates]
    return Thresholds(target.model_copy(update={"gates": tuple(gates)}), compared, hint)


def _kept(gates: Sequence[Gate], latency: bool) -> tuple[Gate, ...]:
    return tuple(gate for gate in gates if not latency or gate.metric.family is Family.LATENCY)


def _differences(own: Sequence[Gate], known: Sequence[Gate], name: str) -> list[str]:
    """One sentence for each gate that is not the same on both sides."""
    ours, theirs = Counter(map(_bound, own)), Counter(map(_bound, known))
    odd, lacking = list((ours - theirs).elements()), list((theirs - ours).elements())
    wanted: dict[Metric, list[str]] = {}
    for metric, bound in lacking:
        wanted.setdefault(metric, []).append(bound)
    found = []
    for metric, bound in odd:
        asked = wanted.get(metric, [])
        says = f"{name}'s is {asked.pop(0)}" if asked else f"{name} has none"
        found.append(f"the artifact's gate for {metric.value} is {bound}, {says}")
    for metric, bounds in wanted.items():
        found += [f"the artifact has no gate for {metric.value}, {name}'s is {bound}" for bound in bounds]
    return found


def _bound(gate: Gate) -> tuple[Metric, str]:
    bound = f"at most {gate.max}" if gate.max is not None else f"at least {gate.min}"
    return gate.metric, bound


def _parts(stated: Target, known: Target) -> list[str]:
    """Settings in which two targets differ, gates and prose left out."""
    names = (name for name in Target.model_fields if name not in ("gates", "summary"))
    return [name for name in names if getattr(stated, name) != getattr(known, name)]
