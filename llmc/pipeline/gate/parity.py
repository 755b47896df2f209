"""Run the parity gate: `build` runs it before it commits an artifact, and `verify` again later.

Its checks run from cheap to costly. Checks that only read files come first, and a gate that is missed there
ends the run before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.artifact.verdict import Measurement, MeasurementStatus, Verdict
from llmc.config import Family, Gate, Metric, Target
from llmc.errors import ParityError
from llmc.pipeline.gate.files import hold_settings, hold_tokenizer, hold_weights
from llmc.pipeline.gate.graph import measure_served, measure_stepped
from llmc.pipeline.gate.loaders import measure_loaders
from llmc.pipeline.gate.run import Run
from llmc.pipeline.gate.subject import Subject
from llmc.pipeline.gate.thresholds import Thresholds, given_thresholds
from llmc.progress import Progress
from llmc.validate.gates import evaluate
from llmc.validate.measure import broken, mismatches, unmeasured

if TYPE_CHECKING:
    from llmc.artifact.latency import Latency
    from llmc.artifact.served import ServerRecord
    from llmc.artifact.store.integrity import Damage

#: Why a metric was not measured.
_AHEAD = "{} missed before"

Step = Callable[[Run], None]


@dataclass(frozen=True)
class Extra:
    """Measurements that builds do not make, added on request of a caller.

    Args:
        metrics: Their metrics.
        gates: The gates on them.
        step: The function that measures it; it runs among the costly steps.
    """

    metrics: tuple[Metric, ...]
    gates: tuple[Gate, ...]
    step: Step


@dataclass(frozen=True)
class GateResult:
    """The measurements of a gate, and the verdict by the target's thresholds."""

    measurements: tuple[Measurement, ...]
    verdict: Verdict
    latency: Latency | None = None
    servers: tuple[ServerRecord, ...] = ()


def parity_gates(target: Target) -> tuple[Gate, ...]:
    """Return the target's gates on everything except latency and servers, which are measured on request."""
    on_request = (Family.LATENCY, Family.SERVER)
    return tuple(gate for gate in target.gates if gate.metric.family not in on_request)


def latency_gates(target: Target) -> tuple[Gate, ...]:
    """Return the target's gates on latency."""
    return tuple(gate for gate in target.gates if gate.metric.family is Family.LATENCY)


def hold_manifest(thresholds: Thresholds, damage: Damage, *, every: bool) -> GateResult | None:
    """Return the verdict if the manifest decides it, before the original is opened; otherwise None.

    Args:
        thresholds: The gates of the subject's target, and their source; a build passes its own.
        damage: How the files differ from the manifest.
        every: As `measure_parity`; code that the manifest does not list is not executed even then.
    """
    measurements, gates = _ahead(thresholds, damage), parity_gates(thresholds.target)
    missed = _first_missed(gates, measurements)
    if damage.code:
        return _conclude(gates, measurements, "code that the manifest does not list is not executed")
    return None if missed is None or every else _conclude(gates, measurements, _AHEAD.format(missed))


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
    """Measure an artifact against the original, and apply the target's parity gates.

    Logits are compared twice. Quality compares the artifact as served with the unmodified original. The
    parity levels ask whether the graph is right regardless of the loss of its weights: the original gets the
    artifact's own weights, and on the CPU quantized products are computed in float32 on both sides, so that a
    tight bound holds for every target. There, what was pruned from the model is pruned from the original too.

    Everything is measured on the CPU, unless the subject names an accelerator of this machine. For targets of
    a GPU, the CPU measures the graph, not the GPU's kernels.

    Args:
        text: The evaluation text.
        damage: How the files differ from the manifest; None for newly written files.
        extras: Measurements and gates beside the target's.
        every: Whether to continue after a check that only reads files has missed its gate.

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
        measured_metrics = {m.metric for m in run.found}
        left = tuple(gate.metric for gate in gates if gate.metric not in measured_metrics)
        run.found += broken(left, error, subject.runtime)
    return GateResult(tuple(run.found), evaluate(gates, run.found), servers=tuple(run.servers))


def _phases(subject: Subject, further: tuple[Step, ...]) -> tuple[tuple[Step, ...], ...]:
    """Return the steps from cheap to costly; a gate missed in one phase ends the run before the next."""
    measure = measure_served if subject.backend.served_by_genai else measure_stepped
    return (
        (hold_settings, hold_tokenizer),
        (hold_weights,),
        (_compare_loaders,),
        (*further, measure),
    )


def _ahead(thresholds: Thresholds, damage: Damage | None) -> list[Measurement]:
    """Return the measurements of the manifest and the files."""
    differences = () if damage is None else damage.all
    files = mismatches(Metric.FILES, differences, "all files match the manifest", "sha256, from the files")
    return [thresholds.compared, files]


def _compare_loaders(run: Run) -> None:
    subject = run.subject
    run.found.append(measure_loaders(subject.checkpoint, subject.model_digest, run.progress))


def _first_missed(gates: Sequence[Gate], measurements: Sequence[Measurement]) -> Metric | None:
    """Return the first gate that a measured value misses; None if none does."""
    missed = evaluate(gates, measurements).missed
    return next((check.metric for check in missed if check.value is not None), None)


def _conclude(gates: Sequence[Gate], measurements: Sequence[Measurement], why: str) -> GateResult:
    """Return the verdict of a run that ends early.

    Args:
        why: Reason for every gate whose metric was not reached; such a gate does not pass.
    """
    measured_metrics = {m.metric for m in measurements}
    status = MeasurementStatus.NOT_MEASURED
    left = [unmeasured(g.metric, status, why, "nowhere") for g in gates if g.metric not in measured_metrics]
    return GateResult((*measurements, *left), evaluate(gates, (*measurements, *left)))
