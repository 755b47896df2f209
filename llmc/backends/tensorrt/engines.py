"""Build the engines of an artifact, resume those pending on their GPU, and find the one for this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.artifact.manifest import FileDigest, Manifest, State
from llmc.artifact.store.folder import Artifact, digest_file
from llmc.backends.tensorrt.engine import load_library, pending, pip_command
from llmc.backends.tensorrt.support import EnginePlan, Library, plan_engines, sm_of
from llmc.backends.tensorrt.worker import build_apart
from llmc.catalog import list_targets
from llmc.config import Target
from llmc.errors import ConfigError, ResourceError
from llmc.gpu import selecting_hint
from llmc.machine import detect_profile
from llmc.profile import Profile
from llmc.progress import Progress

_MEASURE_THE_GRAPH = "llmc verify measures the graph that they are built from, on the CPU"

if TYPE_CHECKING:
    from llmc.artifact.engine import EngineRecord
    from llmc.graph.interface import Interface


def plan_all_engines(target: Target, profiles: Sequence[Profile]) -> tuple[EnginePlan, ...]:
    """Plan the engines that a build needs, without building anything.

    Raises:
        LlmcError: A profile cannot have an engine of this target, or the library that builds it is missing.
    """
    targets = [listed.document for listed in list_targets()]
    plans = plan_engines(target, profiles, targets)
    for each in plans:
        if _builds_here(each):
            load_library(each.library)
    return plans


def write_engines(
    folder: Path, target: Target, interface: Interface, plans: tuple[EnginePlan, ...], progress: Progress
) -> tuple[tuple[EngineRecord, ...], dict[str, FileDigest]]:
    """Build the engines that can be built here from model.onnx in `folder`.

    Returns:
        A record of every engine, including those pending for their GPU, and the digests of the files: the
        engines, and ONNX models around them.
    """
    from llmc.backends.tensorrt.context import write_context

    sparse = target.prune is not None and target.prune.sparsity is not None
    records: list[EngineRecord] = []
    files: dict[str, FileDigest] = {}
    for each in plans:
        if target.engine is None or not _builds_here(each):
            records.append(pending(each))
            progress.note(f"the engine for {', '.join(each.sms)} is built by {each.library.value} on its GPU")
            continue
        with progress.stage(f"engine {', '.join(each.sms)}"):
            record, digest = build_apart(folder, each, target.engine, sparse=sparse)
        if record.doubt is not None:
            progress.note(f"{each.name} is kept, but may be slower than it should be: {record.doubt}")
        if sparse:
            progress.note(f"{each.name} may use kernels for 2:4 sparse weights")
        context = write_context(folder, record, interface)
        if context is not None:
            files[context] = digest_file(folder / context)
        records.append(record.model_copy(update={"context": context}))
        files[each.name] = digest
    return tuple(records), files


def resume_engines(artifact: Artifact, progress: Progress) -> Manifest:
    """Build the pending engines of an artifact that need the GPU of this machine.

    Args:
        artifact: An intact artifact in the state "engine pending".

    Returns:
        Its manifest with the engines.

    Raises:
        ConfigError: None of its engines is pending.
        ResourceError: This machine does not have the GPU or the library that a pending engine needs; the
            artifact is unchanged.
        UnsupportedError: TensorRT refuses the graph.
    """
    manifest, path = artifact.manifest, artifact.path
    plans = _pending_plans(manifest)
    if not plans:
        raise ConfigError(f"{path} has no engine pending: it is {manifest.state.value}")
    for each in plans:
        _require_host(each)
    try:
        records, files = write_engines(path, manifest.target, manifest.interface, plans, progress)
    except BaseException:
        for name in unfinished_files(manifest):
            (path / name).unlink(missing_ok=True)
        raise
    built = {record.sms: record for record in records}
    return manifest.model_copy(
        update={
            "engines": tuple(built.get(record.sms, record) for record in manifest.engines),
            "files": {**manifest.files, **files},
            "state": State.FAILED if manifest.state is State.FAILED else State.NOT_EXECUTED,
        }
    )


def unfinished_files(manifest: Manifest) -> set[str]:
    """Return the names of files of pending engines, including those that exist only while they are built."""
    from llmc.backends.tensorrt.context import context_name

    names = ((plan.name, plan.partial, context_name(plan.name)) for plan in _pending_plans(manifest))
    return {name for each in names for name in each} - manifest.files.keys()


def _pending_plans(manifest: Manifest) -> tuple[EnginePlan, ...]:
    waiting = (record for record in manifest.engines if record.file is None)
    return tuple(EnginePlan(Library(each.library), each.sms, each.profiles) for each in waiting)


def _require_host(plan: EnginePlan) -> None:
    if not _builds_here(plan):
        device = detect_profile().device
        raise ResourceError(
            f"the engine for {', '.join(plan.sms)} needs an NVIDIA GPU of that compute capability "
            f"({', '.join(plan.profiles)}) and {plan.library.value}; this machine is {device}",
            hint=selecting_hint(lambda gpu: sm_of(gpu.capability) in plan.sms)
            or "copy the artifact to a machine with that GPU, and run llmc build --resume there",
        )
    load_library(plan.library)


def _builds_here(plan: EnginePlan) -> bool:
    """Return whether this machine can build an engine: TensorRT-RTX any, TensorRT only one for its GPU."""
    if plan.library is Library.RTX:
        return True
    capability = detect_profile().compute_capability
    return capability is not None and sm_of(capability) in plan.sms


def require_engine(engines: Sequence[EngineRecord], host: Profile) -> EngineRecord:
    """Find the engine that `host` can load with the installed library, by the engines' records.

    Raises:
        ResourceError: None is for its GPU; or it is pending, or needs another library or version.
    """
    own = None if host.compute_capability is None else sm_of(host.compute_capability)
    fitting = [engine for engine in engines if own in engine.sms]
    if not fitting:
        sms = ", ".join(dict.fromkeys(sm for engine in engines for sm in engine.sms))
        raise ResourceError(
            f"the artifact has TensorRT engines for {sms}, but this machine is {host.device}"
            + (f" ({own})" if own else ""),
            hint=selecting_hint(lambda gpu: any(sm_of(gpu.capability) in engine.sms for engine in engines))
            or _MEASURE_THE_GRAPH,
        )
    engine = next((e for e in fitting if e.file is not None), fitting[0])
    if engine.file is None:
        raise ResourceError(
            f"the engine for {own} is pending", hint="build it with llmc build --resume on this machine"
        )
    library = Library(engine.library)
    installed = load_library(library).__version__
    if installed != engine.version:
        raise ResourceError(
            f"{engine.file} was built by {library.value} {engine.version}, the only version that loads it, "
            f"but {installed} is installed",
            hint=f"{pip_command(library, f'=={engine.version}')}, or build it again",
        )
    return engine
