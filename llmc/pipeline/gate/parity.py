"""The parity gate: what `build` runs before it commits an artifact, and `verify` again later.

Its checks run from cheap to costly. What only reads files comes first, and a gate that is missed there ends
the run before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.artifact.verdict import Measurement, MeasurementStatus, Verdict
from llmc.config import Family, Gate, Metric, Target
from llmc.errors import ParityError
from llmc.pipeline.gate.files import hold_settings, hold_tokenizer, hold_weights
from llmc.pipeline.gate.graph import measure_served, measure_static
from llmc.pipeline.gate.loaders import measure_loaders
from llmc.pipeline.gate.run import Run
from llmc.pipeline.gate.subject import Subject
from llmc.pipeline.gate.thresholds import Thresholds, given_thresholds
from llmc.progress import Progress
from llmc.validate.gates import evaluate
from llmc.validate.measure import broken, mismatches, unmeasured

if TYPE_CHECKING:
    from llmc.artifact.latency import Latency
    from llmc.artifact.store.integrity import Damage

#: Why a metric was not measured.
_AHEAD = "{} missed before"

Step = Callable[[Run], None]


@dataclass(frozen=True)
class Extra:
    """A measurement that no build takes, made where a caller asks for it.

    Args:
        metric: Its metric.
        gates: The gates on it.
        step: Takes it; it runs among the costly steps.
    """

    metric: Metric
    gates: tuple[Gate, ...]
    step: Step


@dataclass(frozen=True)
class GateResult:
    """Everything that was measured, and the target's thresholds held against it."""

    measurements: tuple[Measurement, ...]
    verdict: Verdict
    latency: Latency | None = None


def parity_gates(target: Target) -> tuple[Gate, ...]:
    """The target's gates on numbers."""
    return tuple(gate for gate in target.gates if gate.metric.family is not Family.LATENCY)


def latency_gates(target: Target) -> tuple[Gate, ...]:
    """The target's gates on time."""
    return tuple(gate for gate in target.gates if gate.metric.family is Family.LATENCY)


def hold_manifest(thresholds: Thresholds, damage: Damage, *, every: bool) -> GateResult | None:
    """The verdict where the manifest decides it already, before the original is opened; else None.

    Args:
        thresholds: Where the gates of the subject's target are from; None for a build, which is given them.
        damage: What is wrong with the files by the manifest.
        every: As `measure_parity`; code that the manifest does not vouch for is not executed all the same.
    """
    found, gates = _ahead(thresholds, damage), parity_gates(thresholds.target)
    missed = _first_missed(gates, found)
    if damage.code:
        return _conclude(gates, found, "nothing is executed that the manifest does not vouch for")
    return None if missed is None or every else _conclude(gates, found, _AHEAD.format(missed))


def measure_parity(
    subject: Subject,
    text: str,
    progress: Progress,
    *,
    thresholds: Thresholds | None = None,
    damage: Damage | None = None,
    extras: Sequence[Extra] = (),
    every: bool = False,
) -> GateResult:
    """Measure an artifact against the original, and hold the target's parity gates.

    Logits are compared twice. Quality is that of the artifact as it is served beside the original as
    it is. The parity levels ask whether the graph is right whatever its weights lost: the original is
    given the artifact's own weights, and quantized products are computed in float32 on both sides, so
    that a tight bound holds for every target. What pruning left out of the model is left out of it there too.

    All of it is taken on the CPU, unless the subject names an engine for the GPU at hand. Of what is built
    for a GPU that is the graph, not the GPU's kernels.

    Args:
        text: The evaluation text.
        damage: What is wrong with the files by the manifest; None for files that were written just now.
        extras: Measurements to take and gates to hold besides the target's.
        every: Go on after a check that reads files alone has missed its gate.

    Raises:
        ConfigError: The text is too short.
        ResourceError: A runtime is missing.
    """
    gates = (*parity_gates(subject.target), *(gate for extra in extras for gate in extra.gates))
    ahead = _ahead(thresholds or given_thresholds(subject.target), damage)
    run = Run(subject, text, progress, ahead)
    run.require_windows()
    try:
        for phase in _phases(subject, tuple(extra.step for extra in extras)):
            missed = _first_missed(gates, run.found)
            if missed is not None and not every:
                return _conclude(gates, run.found, _AHEAD.format(missed))
            for step in phase:
                step(run)
    except ParityError as error:
        taken = {m.metric for m in run.found}
        left = tuple(gate.metric for gate in gates if gate.metric not in taken)
        run.found += broken(left, error, subject.runtime)
    return GateResult(tuple(run.found), evaluate(gates, run.found))


def _phases(subject: Subject, further: tuple[Step, ...]) -> tuple[tuple[Step, ...], ...]:
    """The steps from cheap to costly; a gate that is missed in one phase ends the run before the next."""
    measure = measure_served if subject.backend.served_by_genai else measure_static
    return (
        (hold_settings, hold_tokenizer),
        (hold_weights,),
        (_compare_loaders,),
        (*further, measure),
    )


def _ahead(thresholds: Thresholds, damage: Damage | None) -> list[Measurement]:
    """What the manifest and the files show."""
    found = () if damage is None else damage.all
    files = mismatches(Metric.FILES, found, "all as the manifest says", "sha256, from the files")
    return [thresholds.compared, files]


def _compare_loaders(run: Run) -> None:
    subject = run.subject
    run.found.append(measure_loaders(subject.checkpoint, subject.model_digest, run.progress))


def _first_missed(gates: Sequence[Gate], found: Sequence[Measurement]) -> Metric | None:
    """The first gate that a figure misses; None if none does."""
    missed = evaluate(gates, found).missed
    return next((check.metric for check in missed if check.value is not None), None)


def _conclude(gates: Sequence[Gate], found: Sequence[Measurement], why: str) -> GateResult:
    """The verdict of a run that ends early.

    Args:
        why: What is said of every gate whose metric was not reached; such a gate does not pass.
    """
    taken = {m.metric for m in found}
    status = MeasurementStatus.NOT_MEASURED
    left = [unmeasured(g.metric, status, why, "nowhere") for g in gates if g.metric not in taken]
    return GateResult((*found, *left), evaluate(gates, (*found, *left)))
