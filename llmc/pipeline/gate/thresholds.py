"""Choose the thresholds for an artifact: built-in ones or those that the user names, never its own.

The manifest says which target the artifact was built for. Its gates are compared with the gates of the
target of that name; an artifact whose thresholds differ from its target's misses `gates.mismatches`.
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
_GATE = Gate(metric=Metric.GATES, max=0, reason="an artifact does not set its own thresholds")
_FILES = Gate(
    metric=Metric.FILES, max=0, reason="a file that the manifest does not describe is not part of the build"
)
_OWN = "--allow-own-gates accepts those of the artifact"


@dataclass(frozen=True)
class Thresholds:
    """The thresholds for an artifact.

    Args:
        target: The target that the manifest states, with the gates that apply.
        compared: Number of the artifact's own gates that differ from its target's.
        hint: What the user can do about a difference.
    """

    target: Target
    compared: Measurement
    hint: str | None = None

    @property
    def missed(self) -> bool:
        """Return whether the artifact's gates differ and the user did not allow it."""
        return bool(self.compared.value) and any(g.metric is Metric.GATES for g in self.target.gates)

    def are_own(self, manifest: Manifest) -> bool:
        """Return whether the gates that apply are those that the artifact was built for."""
        of_files = (Metric.GATES, Metric.FILES)
        applied, own = (
            Counter(_bound(gate) for gate in target.gates if gate.metric not in of_files)
            for target in (self.target, manifest.target)
        )
        return applied == own and not self.missed

    def require(self) -> None:
        """Refuse an artifact whose own gates differ.

        Raises:
            ParityError: They differ, and the user did not allow it.
        """
        if self.missed:
            raise ParityError(f"the gates of the artifact differ: {self.compared.detail}", hint=self.hint)


def choose_thresholds(
    manifest: Manifest, named: str | None, path: Path | None, *, own: bool, latency: bool = False
) -> Thresholds:
    """Choose the gates that apply to an artifact.

    Args:
        named: Target whose gates the user chose, by name or YAML file; None for the target that the manifest
            names.
        path: The user's folder of targets, searched before the built-in ones.
        own: Allow the artifact's own gates to differ, and apply them if no target is named.
        latency: Compare only the gates on latency.

    Raises:
        ConfigError: There is no target of the name that the user gives, or its file is not valid.
    """
    stated = manifest.target
    target = find_target(stated.name, path) if named is None else read_target(named, path)
    if target is None:
        hint = f"--target FILE names the file of target {stated.name}; {_OWN}"
        missing = f"there is no target {stated.name} whose gates could apply"
        return _conclude(stated, [missing], own, hint, "its own apply" if own else "")
    if target.name != stated.name:
        fine = f"those of {target.name}, as requested; the artifact was built for {stated.name}"
        return _conclude(stated.model_copy(update={"gates": target.gates}), [], own, None, fine)
    differences = _differences(_kept(stated.gates, latency), _kept(target.gates, latency), target.name)
    applied = stated if own and named is None else stated.model_copy(update={"gates": target.gates})
    hint = f"build it again with this llmc, {__version__}; it was built with {manifest.llmc_version}; {_OWN}"
    fine = "its own apply" if own and named is None else f"those of {target.name}"
    if parts := _parts(stated, target):
        fine += f"; the artifact was built with another {' and '.join(parts)}"
    return _conclude(applied, differences, own, hint, fine)


def given_thresholds(target: Target) -> Thresholds:
    """Return the gates of the target that a build was given."""
    return Thresholds(target, mismatches(Metric.GATES, (), f"those of {target.name}", "the build's target"))


def _conclude(
    target: Target, differences: Sequence[str], own: bool, hint: str | None, fine: str
) -> Thresholds:
    compared = mismatches(Metric.GATES, differences, fine, _WHERE)
    if differences and fine:
        compared = compared.model_copy(update={"detail": f"{compared.detail}; {fine}"})
    gates = [gate for gate in target.gates if gate.metric is not Metric.GATES]
    gates += [_FILES] if all(gate.metric is not Metric.FILES for gate in gates) else []
    gates = gates if own else [_GATE, *gates]
    return Thresholds(target.model_copy(update={"gates": tuple(gates)}), compared, hint)


def _kept(gates: Sequence[Gate], latency: bool) -> tuple[Gate, ...]:
    return tuple(gate for gate in gates if not latency or gate.metric.family is Family.LATENCY)


def _differences(own: Sequence[Gate], expected: Sequence[Gate], name: str) -> list[str]:
    """Describe each gate that differs between both sides in a sentence."""
    ours, theirs = Counter(map(_bound, own)), Counter(map(_bound, expected))
    odd, lacking = list((ours - theirs).elements()), list((theirs - ours).elements())
    missing: dict[Metric, list[str]] = {}
    for metric, bound in lacking:
        missing.setdefault(metric, []).append(bound)
    differences = []
    for metric, bound in odd:
        bounds_of_metric = missing.get(metric, [])
        says = f"{name}'s is {bounds_of_metric.pop(0)}" if bounds_of_metric else f"{name} has none"
        differences.append(f"the artifact's gate for {metric.value} is {bound}, {says}")
    for metric, bounds in missing.items():
        differences += [
            f"the artifact has no gate for {metric.value}, {name}'s is {bound}" for bound in bounds
        ]
    return differences


def _bound(gate: Gate) -> tuple[Metric, str]:
    bound = f"at most {gate.max}" if gate.max is not None else f"at least {gate.min}"
    return gate.metric, bound


def _parts(stated: Target, other: Target) -> list[str]:
    """Name the settings in which two targets differ, except gates and summary."""
    names = (name for name in Target.model_fields if name not in ("gates", "summary"))
    return [name for name in names if getattr(stated, name) != getattr(other, name)]
