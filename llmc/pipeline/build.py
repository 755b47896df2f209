"""`llmc build`: a model in, a verified artifact out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import __version__
from llmc.artifact.decisions import write_decisions
from llmc.config import Backend, BuildPlan, Provider
from llmc.errors import ConfigError
from llmc.pipeline.compile import Compiled, compile_graph, pass_records, scales_channels
from llmc.pipeline.engines import plan_all_engines, write_engines, write_forecasts
from llmc.pipeline.gate import GateResult, measure_parity
from llmc.pipeline.kernels import KernelStage
from llmc.pipeline.losses import loss_notes
from llmc.pipeline.prune import count_parameters, prune
from llmc.pipeline.rebuild import Rebuilt, finish_graph
from llmc.pipeline.result import BuildResult, build_result, gate_report, write_report
from llmc.pipeline.subject import Subject
from llmc.pipeline.text import write_text
from llmc.profile import ProfileKind
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.artifact.engine import EngineRecord
    from llmc.artifact.manifest import FileDigest, KernelRecord, Manifest, PruneRecord, State
    from llmc.artifact.text import TextRecord
    from llmc.artifact.verdict import Verdict
    from llmc.checkpoint import Checkpoint


def build(plan: BuildPlan, progress: Progress) -> BuildResult:
    """Compile a model for a target and a profile, verify it, and put the artifact in its place.

    What stood at the output before stays until the new artifact is complete. An artifact that misses
    a gate is kept as `<output>.failed` and the result says so.

    Raises:
        LlmcError: Any of its kinds; nothing is left behind.
    """
    from llmc.artifact.manifest import REPORTS
    from llmc.artifact.store import digest_files, staging
    from llmc.backends.ort import write_model
    from llmc.backends.special_tokens import write_generation_config
    from llmc.checkpoint import open_checkpoint
    from llmc.pipeline.calibrate import write_activations
    from llmc.quantize.activations import write_smoothing

    _require_fit(plan)
    kernels = KernelStage.prepare(plan.target, plan.profile)
    engine_plans = plan_all_engines(plan)
    with progress.stage("checkpoint"):
        opened = open_checkpoint(plan.model, plan.adapter)
        checkpoint = replace(opened, chat_template=plan.chat_template)
        checkpoint.require_tokenizer()
        if checkpoint.adapter is not None:
            progress.note(checkpoint.adapter.render())
        for note in checkpoint.notes:
            progress.note(note)
    with ThreadPoolExecutor(1) as background, staging(plan.output) as stage:
        digest = background.submit(checkpoint.digest)
        text = write_text(checkpoint, plan, stage.path, progress)
        pruned = prune(checkpoint, plan.target, progress)
        compiled = compile_graph(pruned.checkpoint, plan.target, progress)
        text_only = checkpoint.text_only_note(compiled.leftovers)
        for note in _leftover_notes(checkpoint, compiled.leftovers, text_only):
            progress.note(note)
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *filter(None, [text_only])))
        put = None if kernels is None else partial(kernels.run, folder=stage.path, progress=progress)
        record = finish_graph(compiled.graph, plan.target, put)
        interface = compiled.graph.interface()
        with progress.stage("write"):
            known = write_model(compiled.graph.model, stage.path, progress.advance)
            for note in loss_notes(stage.path, compiled.weights, compiled.sources):
                progress.note(f"write: {note}")
            if scales_channels(plan.target):
                write_smoothing(stage.path, compiled.smoothing)
            if plan.target.backend is Backend.ONNXRUNTIME:
                _write_genai_config(stage.path, plan, pruned.checkpoint, compiled, record)
            else:
                settings = checkpoint.generation_config()
                write_generation_config(stage.path, checkpoint.config, settings, interface.vocabulary)
        engines, engine_files = write_engines(stage.path, plan.target, interface, engine_plans, progress)
        gate = None
        reports = stage.path / REPORTS
        reports.mkdir()
        write_activations(compiled, reports)
        if pruned.record is not None:
            write_decisions(pruned.decisions, pruned.influence, stage.path, reports)
        executable = kernels is None or kernels.runs_here
        if plan.verify and executable and (plan.target.provider is Provider.CPU or engine_plans):
            subject = Subject(
                folder=stage.path,
                interface=interface,
                target=plan.target,
                threads=plan.profile.threads,
                checkpoint=checkpoint,
                model_digest=digest.result(),
                rebuilt=Rebuilt(compiled.graph, compiled.sources),
                compiled=pruned.checkpoint,
                weights=compiled.weights,
                text=text,
            )
            gate = measure_parity(subject, plan.eval_text, progress, every=plan.every_check)
            name = plan.profile.name
            report = gate_report(
                plan.model, plan.target, name, gate, pruned.record, compiled.weights, stage.path
            )
            write_report(report, reports, "parity")
        files = digest_files(stage.path, {**known, **engine_files})
        manifest = _manifest(
            plan,
            checkpoint,
            text,
            pruned.record,
            compiled,
            digest.result(),
            files,
            engines,
            gate,
            record,
            executable,
        )
        forecasts = write_forecasts(plan, manifest, reports)
        _write_stages(progress, reports / "build.json")
        failed = gate is not None and not gate.verdict.passed
        artifact = stage.keep_failed(manifest) if failed else stage.commit(manifest)
    result = build_result(artifact.path, manifest, gate.verdict if gate else None, progress)
    return result.model_copy(update={"forecasts": forecasts})


def _leftover_notes(checkpoint: Checkpoint, leftovers: Sequence[str], text_only: str | None) -> list[str]:
    """What the graph does not read: towers in one sentence, any other tensor by its name."""
    towers = {name for names in checkpoint.beside.values() for name in names}
    others = [f"the model does not use tensor {n} of the checkpoint" for n in leftovers if n not in towers]
    return [*filter(None, [text_only]), *others]


def _write_genai_config(
    folder: Path,
    plan: BuildPlan,
    checkpoint: Checkpoint,
    compiled: Compiled,
    kernels: KernelRecord | None,
) -> None:
    from llmc.backends.genai import shares_cache, write_genai_config

    interface = compiled.graph.interface()
    write_genai_config(
        folder,
        checkpoint.config,
        checkpoint.generation_config(),
        interface,
        plan.target.provider,
        plan.profile.threads,
        share_cache=shares_cache(compiled.graph.model, interface),
        library=None if kernels is None else kernels.library,
        lookup=plan.target.lookup,
    )


def _require_fit(plan: BuildPlan) -> None:
    """The target's provider and the profile's kind of hardware belong together."""
    wanted = ProfileKind.GPU if plan.target.provider is Provider.CUDA else ProfileKind.CPU
    if plan.profile.kind is not wanted:
        raise ConfigError(
            f"target {plan.target.name} runs on a {wanted.value.upper()}; profile {plan.profile.name} is "
            f"{plan.profile.device}, a {plan.profile.kind.value.upper()}",
            hint="see llmc profiles",
        )


def _manifest(
    plan: BuildPlan,
    checkpoint: Checkpoint,
    text: TextRecord,
    pruned: PruneRecord | None,
    compiled: Compiled,
    digest: str,
    files: dict[str, FileDigest],
    engines: tuple[EngineRecord, ...],
    gate: GateResult | None,
    kernels: KernelRecord | None,
    executable: bool,
) -> Manifest:
    from llmc.artifact.manifest import CheckRecord, Manifest, ModelFacts
    from llmc.artifact.provenance import tool_versions

    verdict = gate.verdict if gate is not None else None
    checks = tuple(
        CheckRecord(metric=c.metric, status=c.status, where=c.where)
        for c in (verdict.checks if verdict is not None else ())
    )
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
        kernels=kernels,
        engines=engines,
        state=_state(plan, engines, verdict, executable),
        checks=checks,
    )


def _state(
    plan: BuildPlan, engines: tuple[EngineRecord, ...], verdict: Verdict | None, executable: bool
) -> State:
    from llmc.artifact.manifest import State

    if verdict is not None and not verdict.passed:
        return State.FAILED
    if any(engine.file is None for engine in engines):
        return State.ENGINE_PENDING
    if plan.target.provider is not Provider.CPU or not executable:
        return State.NOT_EXECUTED
    return State.NOT_VERIFIED if verdict is None else State.VERIFIED


def _write_stages(progress: Progress, path: Path) -> None:
    """Stage timings and peak memory, outside of what the manifest's digests cover."""
    stages: list[dict[str, Any]] = [
        {"name": r.name, "seconds": r.seconds, "peak_rss_bytes": r.peak_rss_bytes} for r in progress.records
    ]
    path.write_text(json.dumps({"stages": stages}, indent=2) + "\n", encoding="utf-8")
