"""Implement `llmc verify`: check the parity gates of an artifact again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.artifact.store.folder import Artifact, open_artifact
from llmc.artifact.store.integrity import find_damage
from llmc.backends import backend_of
from llmc.config import Metric, Target
from llmc.evaluation import read_text
from llmc.pipeline.gate.advice import advise
from llmc.pipeline.gate.derived import compare_derived
from llmc.pipeline.gate.parity import Extra, GateResult, hold_manifest, measure_parity
from llmc.pipeline.gate.ranks import rank_extras
from llmc.pipeline.gate.run import Run
from llmc.pipeline.gate.servers import Runtimes, records_of_all
from llmc.pipeline.gate.subject import Subject, open_compiled
from llmc.pipeline.gate.thresholds import Thresholds, choose_thresholds
from llmc.pipeline.gate.unfinished import finish
from llmc.pipeline.result import GateReport, gate_report, require_folder, write_all
from llmc.pipeline.steps.original import open_pair
from llmc.pipeline.steps.prune import reopen
from llmc.pipeline.steps.rebuild import UNKNOWN_INPUTS, explain_versions, forget_searches, rebuild
from llmc.pipeline.steps.stepwise import measure_passes
from llmc.progress import Progress
from llmc.report import Report, compare_reports, devices_apart, parse_allowed, read_report
from llmc.validate.positions import seed_of

if TYPE_CHECKING:
    from llmc.checkpoint import Checkpoint
    from llmc.validate.tasks import Tasks

_NO_SERVERS = Runtimes()


def verify(
    path: Path,
    against: str | None,
    eval_text: Sequence[str],
    progress: Progress,
    *,
    force: bool = False,
    folder: Path | None = None,
    baseline: Path | None = None,
    allow: tuple[str, ...] = (),
    each_pass: bool = False,
    tasks: Sequence[str] = (),
    task_items: int | None = None,
    every: bool = False,
    target: str | None = None,
    search: Path | None = None,
    own_gates: bool = False,
    adapter: str | None = None,
    seed: int | None = None,
    budget: float | None = None,
    runtimes: Runtimes = _NO_SERVERS,
) -> GateReport:
    """Check an artifact against the parity gates of its target on this machine.

    The artifact is not changed, unless the gate of its build was interrupted: then its outcome is recorded,
    and it is moved to its output path or to `<output>.failed`.

    An engine is executed if its GPU is available; otherwise the graph that it is built from is measured.

    Args:
        each_pass: Run the graph before and after every pass as well.
        path: An artifact.
        against: The original; None for the model that the manifest names.
        adapter: As `open_pair`.
        eval_text: Files with the user's text; empty for the built-in text.
        force: Accept an original that the artifact was not built from.
        folder: Folder for the report in all its formats; None to write none.
        baseline: report.json of an earlier artifact; this one must not be worse.
        tasks: Multiple-choice tasks of lm-evaluation-harness, by name or YAML file.
        task_items: Largest number of items of each task.
        every: Measure everything even if a check that reads only files has missed its gate.
        target: Target whose gates are checked, by name or YAML file; None for the target that the manifest
            names.
        search: The user's folder of targets, searched before the built-in ones.
        own_gates: Allow the artifact's own gates to differ, and check them if no target is named.
        seed: Seed for drawing the positions to compare; None for the artifact's own.
        budget: Seconds of the forecast that decides how many are drawn; None for the default.
        allow: `NAME=PERCENT`, how much worse a figure may be.
        runtimes: Servers that load the artifact in environments of their own, besides transformers.
    """
    from llmc.validate.tasks import load_tasks

    if folder is not None:
        require_folder(folder)
    allowed = parse_allowed(allow)
    earlier = None if baseline is None else read_report(baseline)
    loaded = load_tasks(tasks, task_items) if tasks else None
    with progress.stage("files"):
        artifact = open_artifact(path)
        damage = find_damage(artifact)
    manifest = artifact.manifest
    thresholds = choose_thresholds(manifest, target, search, own=own_gates)
    extras = [_each_pass(thresholds.target)] if each_pass else []
    extras += [*rank_extras(path), *runtimes.extras(manifest.target, thresholds.target)]
    gate, digest = hold_manifest(thresholds, damage, every=every), None
    if gate is None:
        backend_of(manifest.target).require_host(artifact)
        with progress.stage("artifact"):
            _, checkpoint, digest = open_pair(path, against, force=force, adapter=adapter)
        text = read_text(eval_text).text
        subject = _subject(artifact, thresholds, checkpoint, digest, loaded, seed, budget, progress)
        gate = measure_parity(
            subject, text, progress, thresholds=thresholds, damage=damage, extras=extras, every=every
        )
    report = _report(artifact, gate, against, earlier, allowed)
    if folder is not None:
        write_all(report, folder)
    _finish(artifact, report, thresholds, digest, extras, progress)
    hint = thresholds.hint if thresholds.missed else advise(manifest.target, report.verdict)
    return GateReport(report=report, advice=hint)


def _each_pass(target: Target) -> Extra:
    """Apply the target's bound on prefill to every pass, comparing the graph after it with the one before."""

    def measure(run: Run) -> None:
        subject = run.subject
        whole = open_compiled(subject)
        run.found.append(measure_passes(subject.compiled, subject.target, whole, run.progress))

    metric = Metric.PASSES_MAX_ABS
    bounds = [gate for gate in target.gates if gate.metric is Metric.PREFILL_MAX_ABS]
    return Extra((metric,), tuple(gate.model_copy(update={"metric": metric}) for gate in bounds), measure)


def _report(
    artifact: Artifact,
    gate: GateResult,
    against: str | None,
    earlier: Report | None,
    allowed: Mapping[str, float],
) -> Report:
    """Create the report on the artifact from the gate's result.

    Args:
        against: As `verify`.
        earlier: The report to compare it with; None to compare with none.
        allowed: As `compare_reports`.
    """
    path, manifest = artifact.path, artifact.manifest
    gate = replace(gate, servers=records_of_all(gate.servers, manifest.target))
    model, profile = against or manifest.model.ref, manifest.profile.name
    report = gate_report(model, manifest.target, profile, gate, manifest.pruned, manifest.weights, path)
    if earlier is None:
        return report
    apart = devices_apart(earlier, report)
    told = None if apart is None else f"before, {apart[0]}; now, {apart[1]}"
    return report.model_copy(update={"changes": compare_reports(earlier, report, allowed), "apart": told})


def _finish(
    artifact: Artifact,
    report: Report,
    thresholds: Thresholds,
    digest: str | None,
    extras: Sequence[Extra],
    progress: Progress,
) -> None:
    """Record the outcome of an interrupted gate, if its own gates and original were used.

    Args:
        digest: Digest of the original; None if it was not opened.
        extras: Measurements beside the gates of the target.
    """
    manifest = artifact.manifest
    decided = thresholds.are_own(manifest) and digest in (None, manifest.model.digest)
    if manifest.unfinished is not None and decided:
        besides = [metric for extra in extras for metric in extra.metrics]
        finish(artifact, report.verdict, report, progress, besides=besides)


def _subject(
    artifact: Artifact,
    thresholds: Thresholds,
    checkpoint: Checkpoint,
    digest: str,
    tasks: Tasks | None,
    seed: int | None,
    budget: float | None,
    progress: Progress,
) -> Subject:
    """Collect what is measured of an artifact on this machine, and against which original."""
    path, manifest = artifact.path, artifact.manifest
    compiled = reopen(checkpoint, manifest.target, path, progress)
    rebuilt = rebuild(compiled, manifest.target, manifest.weights, path, progress)
    rebuilt = forget_searches(rebuilt, manifest)
    otherwise = explain_versions(manifest)
    with progress.stage("derived files"):
        derived = compare_derived(path, manifest, checkpoint, compiled, rebuilt, otherwise)
    return Subject(
        folder=path,
        interface=manifest.interface,
        target=thresholds.target,
        threads=manifest.profile.threads,
        checkpoint=checkpoint,
        model_digest=digest,
        rebuilt=rebuilt,
        compiled=compiled,
        text=manifest.text,
        accelerated=backend_of(manifest.target).accelerated(artifact, progress),
        tasks=tasks,
        weights=manifest.weights,
        built_otherwise=otherwise if otherwise is not None or rebuilt.complete else UNKNOWN_INPUTS,
        derived=derived,
        foreign=digest != manifest.model.digest,
        seed=seed_of(manifest.files) if seed is None else seed,
        budget=budget,
    )
