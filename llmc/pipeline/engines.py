"""Engines as a step of a build, and the ones that wait for their GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmc.config import Backend, BuildPlan, Target
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.artifact.engine import EngineRecord
    from llmc.artifact.manifest import FileDigest
    from llmc.backends.tensorrt_support import EnginePlan


def plan_all_engines(plan: BuildPlan) -> tuple[EnginePlan, ...]:
    """The engines that a build needs, none for a target of another backend; nothing is built yet.

    Raises:
        LlmcError: A profile cannot have an engine of this target, or what builds it is missing here.
    """
    from llmc.backends.tensorrt import load_library
    from llmc.backends.tensorrt_support import Library, plan_engines
    from llmc.catalog import list_targets

    if plan.target.backend is not Backend.TENSORRT:
        return ()
    known = [listed.document for listed in list_targets()]
    plans = plan_engines(plan.target, (plan.profile, *plan.also), known)
    if any(each.library is Library.RTX for each in plans):
        load_library(Library.RTX)
    return plans


def write_engines(
    folder: Path, target: Target, plans: tuple[EnginePlan, ...], progress: Progress
) -> tuple[tuple[EngineRecord, ...], dict[str, FileDigest]]:
    """Build what can be built here from model.onnx in `folder`.

    Returns:
        A record of every engine, those that wait for their GPU included, and the digests of the files.
    """
    from llmc.backends.tensorrt import build_engine, pending

    records: list[EngineRecord] = []
    files: dict[str, FileDigest] = {}
    for each in plans:
        if target.engine is None or not _builds_here(each):
            records.append(pending(each))
            progress.note(f"the engine for {', '.join(each.sms)} is built by {each.library.value} on its GPU")
            continue
        with progress.stage(f"engine {', '.join(each.sms)}"):
            record, digest = build_engine(folder, each, target.engine)
        records.append(record)
        files[each.name] = digest
    return tuple(records), files


def _builds_here(plan: EnginePlan) -> bool:
    """TensorRT-RTX builds anywhere; TensorRT on the GPU that the engine is for."""
    from llmc.backends.tensorrt_support import Library
    from llmc.machine import detect_profile

    if plan.library is Library.RTX:
        return True
    capability = detect_profile().compute_capability
    return capability is not None and f"SM{capability.replace('.', '')}" in plan.sms
