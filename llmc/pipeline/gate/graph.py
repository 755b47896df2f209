"""Execute an artifact in the gate: compare its text, its logits and its quality with the original's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Family, Metric
from llmc.data import prompts
from llmc.errors import ParityError
from llmc.graph.switches import rope_switches
from llmc.machine import release_memory
from llmc.pipeline.gate.rounding import allow_own_rounding, bound_on_divergence
from llmc.pipeline.gate.run import Run
from llmc.pipeline.gate.subject import open_rounding
from llmc.pipeline.steps.folder import FolderSession, KnownTextsSession, open_folder_session
from llmc.pipeline.steps.original import is_large
from llmc.runtime.arithmetic import Arithmetic
from llmc.validate import generation
from llmc.validate.gates import is_undecided
from llmc.validate.measure import broken, measured, mismatches, unmeasured
from llmc.validate.served import Served

if TYPE_CHECKING:
    from llmc.graph.interface import Interface
    from llmc.runtime.session import Rewindable, Session
    from llmc.validate.generation import ServedText
    from llmc.validate.remembered import RememberedModel


def measure_served(run: Run) -> None:
    """Measure an artifact as onnxruntime-genai serves it, on its accelerator or on the CPU.

    On an accelerator, the parity levels are measured with its kernels, in the served arithmetic. On the CPU
    they are measured on the graph in float32.

    Raises:
        ParityError: The artifact cannot be loaded, so nothing further can be measured.
    """
    from llmc.validate.parity import prepare_parity

    where = _require_interface(run)
    limit = run.subject.interface.max_length
    count = generation.new_tokens(limit)
    chosen_prompts = generation.fitting_prompts(prompts(), run.tokenizer, limit)
    drawn, runtime = _serve(run, chosen_prompts, count)
    release_memory()
    with run.progress.stage("original"):
        _compare_itself(run)
        questions = generation.original_questions(drawn, run.stated.stop)
        run.original.prepare([*run.windows.questions(), *questions], run.progress.advance)
    release_memory()
    rounding = None
    if run.weights.unread:
        run.found += _not_comparable(run.weights.unread, where)
        run.original.release()
    else:
        with run.progress.stage("original with the artifact's weights"):
            run.own.prepare(generation.own_questions(drawn, run.stated.stop), run.progress.advance)
            if drawn:
                run.found += generation.measure_generation(
                    drawn, run.original, run.own, run.stated.stop, runtime, count
                )
            prepare_parity(run.plan, run.own, run.progress.advance)
            run.original.release()
        rounding = _prepare_rounding(run)
        run.own.release()
        release_memory()
        with run.progress.stage("parity"):
            run.found += _compare_levels(run)
        release_memory()
        if run.plan.cache_steps:
            with run.progress.stage("cache"):
                run.found += _measure_cache(run)
    release_memory()
    model = _open_executed(run)
    with run.progress.stage("quality"):
        run.found += _quality(run, model, None, rounding)
    _measure_tasks(run, model)


def measure_stepped(run: Run) -> None:
    """Measure an artifact that llmc itself steps through: its graph, and the engine if its GPU is available.

    Parity is measured on the graph, in float32 and with the artifact's weights on both sides. Quality and the
    choice of tokens step by step are measured on the engine, or otherwise on the graph in its own types.

    Raises:
        ParityError: The backend's library cannot load it.
    """
    from llmc.validate.choices import ask_choices, measure_choices
    from llmc.validate.parity import prepare_parity

    subject = run.subject
    rows = None if subject.accelerated is None else subject.accelerated.rows
    with run.progress.stage("original"):
        _compare_itself(run)
        run.original.prepare(run.windows.questions(), run.progress.advance)
        if subject.accelerated is not None:
            list(ask_choices(run.original, subject.interface, run.tokens))
    with run.progress.stage("original with the artifact's weights"):
        if not run.weights.unread:
            prepare_parity(run.plan, run.own, run.progress.advance)
        run.original.release()
    rounding = None if run.weights.unread else _prepare_rounding(run)
    run.own.release()
    release_memory()
    with run.progress.stage("parity"):
        try:
            graph = _open_graph(run, Arithmetic.EXACT)
        except ParityError as error:
            run.found.append(measured(Metric.INTERFACE, 1.0, error.fact, run.subject.backend.graph_library))
            raise
        release_memory()  # frees a second copy of folded weights
        run.found.append(_interface_of(run, graph))
        if run.weights.unread:
            levels = _not_comparable(run.weights.unread, graph.where)
        else:
            levels = _levels(run, graph)
    del graph
    release_memory()
    if run.plan.cache_steps and not run.weights.unread and not subject.backend.writes_graph:
        with run.progress.stage("cache"):
            run.found += _measure_cache(run)
        run.own.release()
        release_memory()
    model = _open_executed(run, slots=run.windows.tokens.shape[1])
    if subject.accelerated is not None:
        with run.progress.stage("engine"):
            chosen = measure_choices(model, run.original, run.tokens)
            run.original.release()
        levels = (*(m for m in levels if m.metric is not Metric.DECODE_TOP1), chosen)
    run.found += levels
    with run.progress.stage("quality"):
        run.found += _quality(run, model, rows, rounding)
    del model
    if subject.tasks is not None:
        _measure_tasks(run, _open_executed(run, any_text=True))


def _compare_itself(run: Run) -> None:
    """Compare the original's steps over its cache with its own pass, and tell the user where they differ."""
    from llmc.validate.itself import STEPS, STREAMED_STEPS, differs, measure_itself

    checkpoint = run.subject.checkpoint
    steps = STREAMED_STEPS if is_large(checkpoint) else STEPS
    switches = rope_switches(checkpoint.config)
    found = measure_itself(run.original, run.subject.interface.max_length, run.tokens, switches, steps)
    run.found.append(found)
    if differs(found):
        run.progress.note(found.detail)


def _prepare_rounding(run: Run) -> RememberedModel | None:
    """The yardstick of the target, which knows its answers on the first windows; None if it has none."""
    rounding = open_rounding(run.subject, run.own)
    if rounding is not None:
        with run.progress.stage("original with rounded weights"):
            rounding.prepare(run.windows.yardstick_questions(run.original), run.progress.advance)
            rounding.release()
    return rounding


def _quality(
    run: Run, model: Session, rows: int | None, rounding: RememberedModel | None
) -> tuple[Measurement, ...]:
    """Measure quality on some windows of the text, and on all of them if some do not decide a gate.

    Args:
        rows, rounding: As for `measure_quality`.
    """
    from llmc.validate.quality import measure_quality

    unstable = bound_on_divergence(run.subject, run.original, is_large(run.subject.compiled))
    measurements: tuple[Measurement, ...] = ()
    for windows in (run.windows, run.all_windows):
        run.original.prepare(windows.questions(), run.progress.advance)
        run.original.release()
        measurements = measure_quality(
            model, run.original, windows, rows, rounding, unstable, run.progress.advance
        )
        more = len(run.all_windows.tokens) > len(windows.tokens)
        if not more or not is_undecided(run.subject.target.gates, measurements):
            break
    return measurements


def _open_graph(
    run: Run, arithmetic: Arithmetic, slots: int | None = None, *, any_text: bool = False
) -> Rewindable:
    """Open a session of the graph, or of the checkpoint that is the artifact, on the CPU.

    Args:
        slots: Slots of the KV cache that are needed, if its length is fixed.
        any_text: Whether other texts than those of the levels and of the windows will be run.
    """
    subject = run.subject
    if not subject.backend.writes_graph:
        exact, rounds_cache = arithmetic is not Arithmetic.SERVED, arithmetic is not Arithmetic.EXACT
        texts = () if any_text else (*run.plan.all_passes(), run.all_windows.reference_pass)
        return open_folder_session(
            subject.folder, subject.interface, exact=exact, rounds_cache=rounds_cache, texts=texts
        )
    return subject.backend.open_graph(
        subject.folder,
        subject.interface,
        subject.target,
        threads=subject.threads,
        arithmetic=arithmetic,
        slots=slots,
    )


def _measure_cache(run: Run) -> tuple[Measurement, ...]:
    """Measure the loss of attention as served, with the KV cache as served."""
    from llmc.validate.counted import Counted
    from llmc.validate.served_attention import measure_cache

    model = _open_graph(run, Arithmetic.PRODUCTS)
    counted = Counted(model, run.plan.runs_of_cache, run.progress.advance)
    found = measure_cache(counted, run.own, run.plan)
    rounding = model.rounding if isinstance(model, FolderSession | KnownTextsSession) else None
    if rounding is None:
        return found
    ratios = rounding.ratios()
    worst = max(ratios, key=lambda place: ratios[place])
    detail = f"scales of {len(rounding.scales)} layers on the long sequence of the gate; the worst: {worst}"
    detail = "; ".join((detail, *rounding.problems))
    return (*found, measured(Metric.CACHE_SCALE_RATIO, ratios[worst], detail, model.where))


def _compare_levels(run: Run) -> tuple[Measurement, ...]:
    """Measure the parity levels; for compiled kernels and gates on rounding also the rounding of serving."""
    from llmc.validate.paired import Paired, chooses_experts

    subject = run.subject
    gated = any(gate.metric.family is Family.ROUNDING for gate in subject.target.gates)
    if not subject.backend.rounds_attention and not gated:
        on_cpu = subject.accelerated is None
        return _levels(run, _open_graph(run, Arithmetic.EXACT) if on_cpu else _open_executed(run))
    pair = Paired(_open_graph(run, Arithmetic.EXACT), _open_executed(run), chooses_experts(subject.folder))
    return (*_levels(run, pair), *pair.measure())


def _require_interface(run: Run) -> str:
    """Load the graph once, release it, and return what executes it.

    Raises:
        ParityError: onnxruntime cannot load it, or its interface differs.
    """
    release_memory()
    with run.progress.stage("interface"):
        try:
            where = _open_executed(run).where
        except ParityError as error:
            run.found.append(measured(Metric.INTERFACE, 1.0, error.fact, run.subject.backend.graph_library))
            raise
        run.found.append(_interface_holds(run.subject.interface, where))
    return where


def _serve(run: Run, chosen_prompts: Sequence[str], count: int) -> tuple[tuple[ServedText, ...], str]:
    """Return onnxruntime-genai's text for each prompt, and its name; no text if nothing can judge it.

    Raises:
        ParityError: The runtime cannot load the folder.
        ResourceError: The runtime is not installed.
    """
    with run.progress.stage("generation"):
        gpu = None if run.subject.accelerated is None else run.subject.accelerated.gpu
        served = Served(run.subject.folder, gpu)
        if run.weights.unread:
            return (), served.where
        try:
            drawn = generation.served_texts(
                served, run.codec, run.tokenizer, chosen_prompts, count, run.progress.advance
            )
        except ParityError as error:
            run.found += broken(Family.GENERATION.metrics, error, served.where)
            drawn = ()
        return drawn, served.where


def _levels(run: Run, model: Session) -> tuple[Measurement, ...]:
    """Measure the parity levels against the original with the artifact's weights; releases the original."""
    from llmc.validate.counted import Counted
    from llmc.validate.parity import Parity

    counted = Counted(model, run.plan.runs_of_levels, run.progress.advance)
    parity, large = Parity(counted, run.own, run.plan), is_large(run.subject.compiled)
    levels = allow_own_rounding(run.subject, run.own, parity, parity.measure(), large)
    run.own.release()
    return levels


def _not_comparable(unread: Sequence[str], where: str) -> tuple[Measurement, ...]:
    """Mark levels that need the original with the artifact's weights as not measured."""
    why = f"{len(unread)} weights are stored in a form that cannot be read back, the first {unread[0]}"
    status = MeasurementStatus.NOT_MEASURED
    return tuple(unmeasured(m, status, why, where) for m in Metric if m.family.needs_own_weights)


def _measure_tasks(run: Run, model: Session) -> None:
    from llmc.validate.tasks import measure_tasks

    if run.subject.tasks is not None:
        with run.progress.stage("tasks"):
            run.found.append(measure_tasks(model, run.original, run.tokenizer, run.subject.tasks))


def _open_executed(run: Run, slots: int | None = None, *, any_text: bool = False) -> Rewindable:
    """Open the artifact on its accelerator, or its graph on the CPU, in pieces of an engine's size.

    Args:
        slots: Slots of the KV cache that are needed; the graph gets no more.
        any_text: As for `_open_graph`.
    """
    accelerated = run.subject.accelerated
    if accelerated is not None:
        return accelerated.open()
    return _open_graph(run, Arithmetic.SERVED, slots, any_text=any_text)


def _interface_of(run: Run, session: Rewindable) -> Measurement:
    """Measure INTERFACE for an opened artifact: what its loader did not read, for a checkpoint."""
    if isinstance(session, FolderSession | KnownTextsSession):
        return mismatches(Metric.INTERFACE, session.problems, session.fine, session.where)
    return _interface_holds(run.subject.interface, session.where)


def _interface_holds(interface: Interface, where: str) -> Measurement:
    fine = f"{len(interface.inputs)} inputs and {len(interface.outputs)} outputs as stated"
    return mismatches(Metric.INTERFACE, (), fine, where)
