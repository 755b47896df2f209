"""Define what `llmc tune` varies: targets that differ from a base in how weights are stored and multiplied.

Candidates use the passes, types and kernels of their base; several bases provide several of them. Rules of a
base that keep matrices in float, or that name matrices, precede the rules generated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, get_args

from llmc.config import (
    METHODS,
    Allocation,
    CalibrationText,
    LeastSquares,
    Quantization,
    Target,
    WeightRole,
    WeightRule,
    WeightScheme,
)
from llmc.errors import ConfigError, UnsupportedError
from llmc.profile import ProfileKind

#: Matrices that share a scheme: roles by the name of their group; all other roles belong to `linear`.
_GROUPS: dict[str, tuple[WeightRole, ...]] = {
    "head": (WeightRole.LM_HEAD, WeightRole.EMBEDDING),
    "residual": (WeightRole.RESIDUAL,),
    "linear": (),
}
#: Levels for int8 and float32 activations; ONNX Runtime has no other kernels for a CPU.
_ACCURACY_LEVELS = (4, 1)
#: Stored bits per weight between 4 bits in blocks of 128 and 8 bits.
_BUDGETS = (4.4, 4.6, 4.8, 5.0, 5.2, 5.5, 6.0, 7.0)
#: Settings of cpu-mixed, for a base that has none.
_CALIBRATION = CalibrationText(window_tokens=512, max_windows=32)
_SENSITIVITY = CalibrationText(window_tokens=256, max_windows=8)

Option = TypeVar("Option", bool, int, float, str)
#: Value of each variable.
Choices = dict[str, bool | int | float | str]


class Choose(Protocol):
    """The function that picks an option of a variable."""

    def __call__(self, name: str, options: Sequence[Option]) -> Option: ...


def _literals(field: str) -> tuple[int, ...]:
    return get_args(WeightScheme.model_fields[field].annotation)


@dataclass(frozen=True)
class Space:
    """The candidates of a tuning.

    Args:
        bases: Targets that candidates are derived from, by name.
    """

    bases: Mapping[str, Target]

    @classmethod
    def around(cls, bases: Sequence[Target]) -> Space:
        """Create the candidates around some targets.

        Raises:
            UnsupportedError: A target does not run on a CPU.
            ConfigError: A target has no weights that could be stored differently, or is named twice.
        """
        for base in bases:
            if base.hardware is not ProfileKind.CPU:
                raise UnsupportedError(
                    f"llmc tune measures on this machine's CPU, but target {base.name} {_elsewhere(base)}",
                    hint="tune a CPU target: llmc targets",
                )
            last = base.quantize.rules[-1] if base.quantize is not None and base.quantize.rules else None
            if last is None or last.scheme is None or last.role is not None or last.match != "*":
                raise ConfigError(
                    f"target {base.name} has no general scheme for weights, so nothing can be varied",
                    hint="its last rule needs a scheme, and neither role nor match: see cpu-int4",
                )
        named = {base.name: base for base in bases}
        if len(named) != len(bases):
            raise ConfigError(f"--target {','.join(b.name for b in bases)} names a target twice")
        return cls(named)

    def target(self, choose: Choose) -> Target:
        """Return the candidate for some choices."""
        names = tuple(self.bases)
        base = self.bases[choose("target", names) if len(names) > 1 else names[0]]
        level = choose("accuracy_level", _ACCURACY_LEVELS)
        method = choose("method", tuple(METHODS))
        if choose("allocated", (False, True)):
            schemes = {name: _scheme(4, 32, False, method) for name in _GROUPS}
            allocation = _allocation(base, method, choose("budget_bits", _BUDGETS))
        else:
            allocation = None
            schemes = {
                name: _scheme(
                    choose(f"{name}.bits", _literals("bits")),
                    choose(f"{name}.block_size", _literals("block_size")),
                    choose(f"{name}.symmetric", (False, True)),
                    method,
                )
                for name in _GROUPS
            }
        return _with_weights(base, level, schemes, allocation)

    def anchors(self) -> list[Choices]:
        """Return the first choices: the nearest to each base, the finest, the smallest, one allocated."""
        anchors: list[Choices] = []
        for name, base in self.bases.items():
            rest: Choices = {"target": name} if len(self.bases) > 1 else {}
            anchors.append({**rest, **_nearest(base)})
        first = {k: v for k, v in anchors[0].items() if k in ("target", "accuracy_level")}
        for bits, block, symmetric in ((8, 32, True), (4, 128, True)):
            plain: Choices = {"method": LeastSquares.name, "allocated": False}
            anchors.append({**first, **plain, **_uniform(bits, block, symmetric)})
        anchors.append({**first, "method": LeastSquares.name, "allocated": True, "budget_bits": 5.2})
        return anchors


def _uniform(bits: int, block: int, symmetric: bool) -> Choices:
    return {
        f"{name}.{key}": value
        for name in _GROUPS
        for key, value in (("bits", bits), ("block_size", block), ("symmetric", symmetric))
    }


def _nearest(base: Target) -> Choices:
    """Return the choices that give `base`, or the nearest candidate to it."""
    stated = _quantization(base)
    general = stated.rules[-1].scheme
    if general is None:
        raise ConfigError(f"target {base.name} has no general scheme for weights")
    level = 4 if stated.accuracy_level == 4 else 1
    rest: Choices = {"accuracy_level": level, "method": general.method.name}
    if stated.allocation is not None:
        budget_bits = stated.allocation.budget_bits or 5.2
        return {
            **rest,
            "allocated": True,
            "budget_bits": min(_BUDGETS, key=lambda budget: abs(budget - budget_bits)),
        }
    rest["allocated"] = False
    for name, roles in _GROUPS.items():
        fit = (r.scheme for r in stated.rules if r.scheme is not None and r.match == "*" and r.role in roles)
        scheme = next(fit, general)
        rest |= {
            f"{name}.bits": scheme.bits,
            f"{name}.block_size": scheme.block_size,
            f"{name}.symmetric": scheme.symmetric,
        }
    return rest


def _quantization(base: Target) -> Quantization:
    if base.quantize is None:
        raise ConfigError(f"target {base.name} has no quantization")
    return base.quantize


def _scheme(bits: int, block: int, symmetric: bool, method: str) -> WeightScheme:
    """Create a scheme; with 8 bits, scales are searched where other widths are calibrated."""
    stated = METHODS[method]()
    configured = stated.uncalibrated() if bits == 8 else stated
    return WeightScheme.model_validate(
        {"bits": bits, "block_size": block, "symmetric": symmetric, "method": configured}
    )


def _allocation(base: Target, method: str, budget: float) -> Allocation:
    stated = _quantization(base).allocation
    choices = (
        *(_scheme(4, block, False, method) for block in (64, 128)),
        _scheme(8, 128, True, method),
    )
    text = _SENSITIVITY if stated is None else stated.text
    return Allocation(choices=choices, text=text, budget_bits=budget)


def _with_weights(
    base: Target, level: int, schemes: Mapping[str, WeightScheme], allocation: Allocation | None
) -> Target:
    stated = _quantization(base)
    rules = [rule for rule in stated.rules if rule.scheme is None or rule.match != "*"]
    for name, roles in _GROUPS.items():
        if schemes[name] != schemes["linear"]:
            rules += [WeightRule(role=role, scheme=schemes[name]) for role in roles]
    rules.append(WeightRule(scheme=schemes["linear"]))
    used = [rule.scheme for rule in rules if rule.scheme is not None]
    used += allocation.choices if allocation is not None else ()
    calibrated = any(scheme.method.needs_calibration for scheme in used)
    quantize = Quantization.model_validate(
        {
            "accuracy_level": level,
            "kept_accuracy": stated.kept_accuracy if level == stated.accuracy_level else {},
            "scales": stated.scales,
            "rules": tuple(rules),
            "calibration": (stated.calibration or _CALIBRATION) if calibrated else None,
            "scale_channels": stated.scale_channels and calibrated,
            "allocation": allocation,
        }
    )
    return base.model_copy(update={"quantize": quantize})


def describe(target: Target) -> str:
    """Describe what distinguishes a candidate in a few words: bits x block size, `s` if symmetric."""
    stated = _quantization(target)
    parts = [target.name]
    if stated.allocation is not None:
        bound = stated.allocation
        parts.append(
            f"{bound.budget_bits:g} bits allocated" if bound.budget_bits else f"KL {bound.max_kl:g} allocated"
        )
    parts += [
        f"{'*' if rule.role is None else rule.role.value} "
        f"{rule.scheme.bits}x{rule.scheme.block_size}{'s' if rule.scheme.symmetric else ''}"
        for rule in stated.rules
        if rule.scheme is not None and stated.allocation is None
    ]
    methods = dict.fromkeys(r.scheme.method.name for r in stated.rules if r.scheme is not None)
    return ", ".join([*parts, "+".join(methods), f"level {stated.accuracy_level}"])


def _elsewhere(target: Target) -> str:
    """Return where a target runs that does not run on a CPU in this process."""
    return "is for servers" if target.hardware is None else "runs on a GPU"
