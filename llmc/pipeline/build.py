"""Implement `llmc build`: compile a model into a verified artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import __version__
from llmc.artifact.manifest import REPORTS, FileDigest, Manifest, ModelFacts, PruneRecord, State
from llmc.artifact.provenance import tool_versions
from llmc.artifact.store.decisions import write_decisions
from llmc.artifact.store.disk import replace_text
from llmc.artifact.store.folder import Artifact, Staging, digest_folder, staging
from llmc.backends import backend_of
from llmc.backends.base import BackendOutput, Stage
from llmc.config import BuildPlan
from llmc.errors import ConfigError
from llmc.pipeline.gate.parity import measure_parity
from llmc.pipeline.gate.ranks import rank_extras
from llmc.pipeline.gate.subject import Subject
from llmc.pipeline.gate.unfinished import BEGUN, explaining, put_by_verdict, record_verdict
from llmc.pipeline.result import BuildResult, build_result, gate_report, write_report
from llmc.pipeline.steps.compile import Compiled, compile_graph, pass_records
from llmc.pipeline.steps.losses import loss_notes
from llmc.pipeline.steps.prune import count_parameters, prune
from llmc.pipeline.steps.rebuild import Rebuilt
from llmc.pipeline.steps.shards import require_shards, write_shards
from llmc.pipeline.steps.text import write_text
from llmc.progress import Progress
from llmc.scratch import record_output
from llmc.validate.positions import seed_of

if TYPE_CHECKING:
    from llmc.artifact.forecast import Forecast
    from llmc.artifact.text import TextRecord
    from llmc.artifact.verdict import Verdict
    from llmc.checkpoint import Checkpoint


@dataclass(frozen=True)
class Built:
    """A folder with all of an artifact except the outcome of its gates.

    Args:
        manifest: Its manifest, without an outcome.
        forecasts: Latency bounds by profile for engines.
        subject: What the gates measure; None if they are not to run, or cannot run here.
        pruned: What was pruned from the model.
    """

    manifest: Manifest
    forecasts: tuple[Forecast, ...]
    subject: Subject | None
    pruned: PruneRecord | None


def build(plan: BuildPlan, progress: Progress) -> BuildResult:
    """Compile a model for a target and a profile, verify it, and move the artifact to its output path.

    An existing artifact at the output stays until the new one is complete and verified. An artifact that
    misses a gate is kept as `<output>.failed`, and the result says so. If the gates are interrupted or cannot
    run, the build is kept with the state "built, not verified": at the output if nothing is there, otherwise
    as `<output>.unverified`; `llmc verify` finishes it.

    Raises:
        LlmcError: Any subclass; before the gates no files are left behind.
    """
    from llmc.checkpoint import open_checkpoint

    _require_fit(plan)
    prepared = backend_of(plan.target).prepare(plan)
    with progress.stage("checkpoint"):
        opened = open_checkpoint(plan.model, plan.adapter)
        checkpoint = replace(opened, chat_template=plan.chat_template)
        checkpoint.require_tokenizer()
        if checkpoint.adapter is not None:
            progress.note(checkpoint.adapter.render())
        for note in checkpoint.notes:
            progress.note(note)
        require_shards(plan, checkpoint)
    with ExitStack() as stack:
        background = ThreadPoolExecutor(1)
        stack.callback(background.shutdown, wait=False, cancel_futures=True)
        record_output(plan.output)
        stage = stack.enter_context(staging(plan.output))
        digest = background.submit(checkpoint.digest)
        built = _write(plan, checkpoint, prepared, stage.path, digest, progress)
        _write_stages(progress, stage.path / REPORTS / "build.json")
        verdict = None
        if built.subject is None:
            artifact = stage.commit(built.manifest)
        else:
            artifact, verdict = _hold_gates(plan, built, built.subject, prepared, stage, progress)
    result = build_result(artifact.path, artifact.manifest, verdict, progress)
    return result.model_copy(update={"forecasts": built.forecasts})


def _hold_gates(
    plan: BuildPlan, built: Built, subject: Subject, prepared: Stage, stage: Staging, progress: Progress
) -> tuple[Artifact, Verdict]:
    """Store the build as unverified, measure it there, and move it to the place that its verdict requires."""
    unfinished = built.manifest.model_copy(update={"unfinished": BEGUN})
    unverified = stage.keep_unverified(unfinished)
    reports = unverified.path / REPORTS
    with explaining(stage, unfinished, plan.eval_text.names, progress):
        subject = replace(subject, folder=unverified.path, accelerated=prepared.accelerated(unverified))
        extras = rank_extras(unverified.path)
        text = plan.eval_text.text
        gate = measure_parity(subject, text, progress, extras=extras, every=plan.every_check)
        name, weights = plan.profile.name, built.manifest.weights
        report = gate_report(plan.model, plan.target, name, gate, built.pruned, weights, unverified.path)
        write_report(report, reports, "parity")
        _write_stages(progress, reports / "build.json")
        return put_by_verdict(stage, record_verdict(built.manifest, gate.verdict)), gate.verdict


def _write(
    plan: BuildPlan,
    opened: Checkpoint,
    prepared: Stage,
    folder: Path,
    digest: Future[str],
    progress: Progress,
) -> Built:
    """Run the phases of a build, which write every file of the artifact except its manifest into `folder`."""
    text = write_text(opened, plan, folder, progress)
    pruned = prune(opened, plan.target, progress)
    compiled = compile_graph(pruned.checkpoint, plan.target, prepared, progress)
    copied = not backend_of(plan.target).writes_graph
    checkpoint = _note_unread(opened, compiled, progress, copied=copied)
    kernels = prepared.lower(compiled.graph, folder, progress)
    files = _write_model(plan, pruned.checkpoint, compiled, folder, progress)
    files |= write_shards(plan, folder, progress)
    interface = compiled.graph.interface()
    written = replace(prepared.write(folder, interface, progress), kernels=kernels)
    reports = folder / REPORTS
    reports.mkdir()
    _write_activations(compiled, reports)
    if pruned.record is not None:
        write_decisions(pruned.decisions, pruned.influence, folder, reports)
    manifest = _manifest(
        plan,
        checkpoint,
        text,
        pruned.record,
        compiled,
        digest.result(),
        digest_folder(folder, {**files, **written.files}),
        written,
        prepared.state(written),
    )
    forecasts = _write_forecasts(plan, manifest, reports)
    subject = Subject(
        folder=folder,
        interface=interface,
        target=plan.target,
        threads=plan.profile.threads,
        checkpoint=checkpoint,
        model_digest=digest.result(),
        rebuilt=Rebuilt(compiled.graph, compiled.sources),
        compiled=pruned.checkpoint,
        weights=compiled.weights,
        text=text,
        seed=seed_of(manifest.files) if plan.seed is None else plan.seed,
        budget=plan.budget,
    )
    gated = plan.verify and prepared.measurable
    return Built(manifest, forecasts, subject if gated else None, pruned.record)


def _note_unread(opened: Checkpoint, compiled: Compiled, progress: Progress, *, copied: bool) -> Checkpoint:
    """Report what the graph does not read; return the checkpoint with the note on towers among its notes.

    Args:
        copied: Whether the artifact holds the tensors all the same.
    """
    text_only = opened.text_only_note(compiled.unread, copied=copied)
    for note in _unread_notes(opened, compiled.unread, text_only):
        progress.note(note)
    return replace(opened, notes=(*opened.notes, *filter(None, [text_only])))


def _write_model(
    plan: BuildPlan, checkpoint: Checkpoint, compiled: Compiled, folder: Path, progress: Progress
) -> dict[str, FileDigest]:
    """Write the model with its weights, and the files beside it by which it is served.

    Args:
        checkpoint: The checkpoint that was compiled.

    Returns:
        Digests of the model and its weights.
    """
    from llmc.quantize.activations import write_smoothing

    graph, target, backend = compiled.graph, plan.target, backend_of(plan.target)
    with progress.stage("write"):
        files = backend.write_model(graph, folder, target, checkpoint, progress)
        if backend.quantizer(target).scales_channels:
            write_smoothing(folder, compiled.smoothing)
        generation_config = checkpoint.generation_config()
        backend.write_serving(folder, target, plan.profile.threads, checkpoint, generation_config, graph)
        for note in loss_notes(folder, backend, compiled.weights, compiled.sources):
            progress.note(f"write: {note}")
    return dict(files)


def _write_forecasts(plan: BuildPlan, manifest: Manifest, reports: Path) -> tuple[Forecast, ...]:
    """Forecast the latency on each profile; write the bounds as forecast.json if there are any."""
    profiles = (plan.profile, *plan.also)
    forecasts = backend_of(plan.target).forecasts(plan.target, profiles, manifest)
    if forecasts:
        bounds = [each.model_dump(mode="json") for each in forecasts]
        replace_text(reports / "forecast.json", json.dumps(bounds, indent=2) + "\n")
    return forecasts


#: The name of a tensor in one of many layers, and that of its layer.
_IN_A_LAYER = re.compile(r"(.*?\.\d+)\.")


def _unread_notes(checkpoint: Checkpoint, unread: Sequence[str], text_only: str | None) -> list[str]:
    """Return notes on what the graph does not read: on towers, parts of layers, and other tensors."""
    towers = {name for names in checkpoint.beside.values() for name in names}
    places: dict[str, list[str]] = {}
    for name in unread:
        if name not in towers:
            layer = _IN_A_LAYER.match(name)
            places.setdefault(layer[1] if layer else name, []).append(name)
    which = (
        f"tensor {names[0]}" if len(names) == 1 else f"{len(names)} tensors of {place}"
        for place, names in places.items()
    )
    others = [f"the model does not use {each} of the checkpoint" for each in which]
    return [*filter(None, [text_only]), *others]


def _require_fit(plan: BuildPlan) -> None:
    """Require that the profile's kind of hardware is what the target runs on."""
    hardware = plan.target.hardware
    if hardware is not None and plan.profile.kind is not hardware:
        raise ConfigError(
            f"target {plan.target.name} runs on a {hardware.value.upper()}; profile {plan.profile.name} is "
            f"{plan.profile.device}, a {plan.profile.kind.value.upper()}",
            hint="see llmc profiles",
        )


def _write_activations(compiled: Compiled, folder: Path) -> None:
    """Write the statistics of activations, if there are any, as activations.json in `folder`.

    Peaks are taken of the original's modules in float32, ranges and ratios, in dB, of quantized activations.
    """
    activations = compiled.activations
    if not activations.peaks:
        return
    facts: dict[str, object] = {
        "peaks": dict(sorted(activations.peaks.items(), key=lambda item: -item[1])),
        "snr_db": {name: each.snr_db for name, each in activations.ranges.items()},
        "smoothed": [name for name, each in activations.ranges.items() if each.smoothing is not None],
        "float": {each.weight: each.reason for each in compiled.floats},
    }
    if not activations.experts:  # from these alone, verify computes the scales again
        facts["ranges"] = {name: each.peak for name, each in activations.ranges.items()}
    text = json.dumps(facts, indent=2)
    (folder / "activations.json").write_text(text + "\n", encoding="utf-8")


def _manifest(
    plan: BuildPlan,
    checkpoint: Checkpoint,
    text: TextRecord,
    pruned: PruneRecord | None,
    compiled: Compiled,
    digest: str,
    files: dict[str, FileDigest],
    written: BackendOutput,
    state: State,
) -> Manifest:
    return Manifest(
        llmc_version=__version__,
        model=ModelFacts(
            ref=plan.model,
            digest=digest,
            architecture=checkpoint.architecture,
            model_type=checkpoint.config.model_type,
            parameters=count_parameters(checkpoint),
            notes=checkpoint.notes,
            adapter=checkpoint.adapter,
        ),
        target=plan.target,
        profile=plan.profile,
        also=plan.also,
        interface=compiled.graph.interface(),
        tools=tool_versions(),
        files=files,
        passes=pass_records(compiled.passes),
        weights=compiled.weights,
        text=text,
        pruned=pruned,
        state=state,
        **written.records(),
    )


def _write_stages(progress: Progress, path: Path) -> None:
    """Write stage timings and peak memory to a file that the manifest's digests do not cover."""
    stages: list[dict[str, Any]] = [
        {"name": r.name, "seconds": r.seconds, "peak_rss_bytes": r.peak_rss_bytes} for r in progress.records
    ]
    replace_text(path, json.dumps({"stages": stages}, indent=2) + "\n")
