"""Steps of the gate that execute an artifact: its text, its logits and its quality beside the original's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Family, Metric
from llmc.data import prompts
from llmc.errors import ParityError
from llmc.machine import release_memory
from llmc.pipeline.gate.rounding import allow_own_rounding, bound_on_divergence
from llmc.pipeline.gate.run import Run
from llmc.pipeline.gate.subject import is_large, open_rounding
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
    """Measure an artifact that onnxruntime-genai serves, as it serves it.

    Raises:
        ParityError: The artifact cannot be loaded, so that nothing further can be measured.
    """
    from llmc.validate.parity import prepare_parity

    where = _require_interface(run)
    limit = run.subject.interface.max_length
    count = generation.new_tokens(limit)
    asked = generation.fitting_prompts(prompts(), run.tokenizer, limit)
    drawn, runtime = _serve(run, asked, count)
    release_memory()
    with run.progress.stage("original"):
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
        rounding = open_rounding(run.subject, run.own)
        if rounding is not None:
            with run.progress.stage("original with rounded weights"):
                rounding.prepare(run.windows.yardstick_questions(run.original), run.progress.advance)
                rounding.release()
        run.own.release()
        release_memory()
        with run.progress.stage("parity"):
            run.found += _compare_exact(run)
        release_memory()
        if run.plan.cache_steps:
            with run.progress.stage("cache"):
                run.found += _measure_cache(run)
    release_memory()
    model = _open_graph(run, Arithmetic.SERVED)
    with run.progress.stage("quality"):
        run.found += _quality(run, model, None, rounding)
    _measure_tasks(run, model)


def measure_static(run: Run) -> None:
    """Measure the graph that engines are parsed from, and the engine where its GPU is at hand.

    Parity is the graph's, in float32 and with the artifact's weights on both sides. Quality and the choice of
    tokens step by step are the engine's, or else those of the graph in its own types.

    Raises:
        ParityError: TensorRT or onnxruntime cannot load it.
    """
    from llmc.validate.choices import ask_choices, measure_choices
    from llmc.validate.parity import prepare_parity

    subject = run.subject
    rows = None if subject.accelerated is None else subject.accelerated.rows
    with run.progress.stage("original"):
        run.original.prepare(run.windows.questions(), run.progress.advance)
        if subject.accelerated is not None:
            list(ask_choices(run.original, subject.interface, run.tokens))
    with run.progress.stage("original with the artifact's weights"):
        if not run.weights.unread:
            prepare_parity(run.plan, run.own, run.progress.advance)
        run.original.release()
        run.own.release()
    release_memory()
    with run.progress.stage("parity"):
        try:
            graph = _open_graph(run, Arithmetic.EXACT)
        except ParityError as error:
            run.found.append(measured(Metric.INTERFACE, 1.0, error.fact, "onnxruntime"))
            raise
        release_memory()  # a second copy of weights that were folded
        run.found.append(_interface_holds(subject.interface, graph.where))
        if run.weights.unread:
            levels = _not_comparable(run.weights.unread, graph.where)
        else:
            levels = _levels(run, graph)
    del graph
    release_memory()
    model = _open_static(run, slots=run.windows.tokens.shape[1])
    if subject.accelerated is not None:
        with run.progress.stage("engine"):
            chosen = measure_choices(model, run.original, run.tokens)
            run.original.release()
        levels = (*(m for m in levels if m.metric is not Metric.DECODE_TOP1), chosen)
    run.found += levels
    with run.progress.stage("quality"):
        run.found += _quality(run, model, rows)
    del model
    if subject.tasks is not None:
        _measure_tasks(run, _open_static(run))


def _quality(
    run: Run, model: Session, rows: int | None, rounding: RememberedModel | None = None
) -> tuple[Measurement, ...]:
    """Quality on some windows of the text, and on all of them where some do not decide a gate.

    Args:
        rows, rounding: As for `measure_quality`.
    """
    from llmc.validate.quality import measure_quality

    unstable = bound_on_divergence(run.subject, run.original, is_large(run.subject.compiled))
    found: tuple[Measurement, ...] = ()
    for windows in (run.windows, run.all_windows):
        run.original.prepare(windows.questions(), run.progress.advance)
        run.original.release()
        found = measure_quality(model, run.original, windows, rows, rounding, unstable, run.progress.advance)
        more = len(run.all_windows.tokens) > len(windows.tokens)
        if not more or not is_undecided(run.subject.target.gates, found):
            break
    return found


def _open_graph(run: Run, arithmetic: Arithmetic, slots: int | None = None) -> Rewindable:
    """A session of the graph on the CPU.

    Args:
        slots: Slots of the KV cache that are needed, where its length is fixed.
    """
    subject = run.subject
    return subject.backend.open_graph(
        subject.folder,
        subject.interface,
        subject.target,
        threads=subject.threads,
        arithmetic=arithmetic,
        slots=slots,
    )


def _measure_cache(run: Run) -> tuple[Measurement, ...]:
    """What attention loses as it is served, over the KV cache that is served."""
    from llmc.validate.counted import Counted
    from llmc.validate.served_attention import measure_cache

    model = _open_graph(run, Arithmetic.PRODUCTS)
    return measure_cache(Counted(model, run.plan.runs_of_cache, run.progress.advance), run.own, run.plan)


def _compare_exact(run: Run) -> tuple[Measurement, ...]:
    """The parity levels in float32; for compiled kernels also what they round as they are served."""
    from llmc.validate.paired import Paired, chooses_experts

    target, exact = run.subject.target, _open_graph(run, Arithmetic.EXACT)
    asked = any(gate.metric.family is Family.ROUNDING for gate in target.gates)
    if not run.subject.backend.rounds_attention and not asked:
        return _levels(run, exact)
    pair = Paired(exact, _open_graph(run, Arithmetic.SERVED), chooses_experts(run.subject.folder))
    return (*_levels(run, pair), *pair.measure())


def _require_interface(run: Run) -> str:
    """Load the graph once and let go of it; what executes it.

    Raises:
        ParityError: onnxruntime cannot load it, or it has another interface.
    """
    release_memory()
    with run.progress.stage("interface"):
        try:
            where = _open_graph(run, Arithmetic.SERVED).where
        except ParityError as error:
            run.found.append(measured(Metric.INTERFACE, 1.0, error.fact, "onnxruntime"))
            raise
        run.found.append(_interface_holds(run.subject.interface, where))
    return where


def _serve(run: Run, asked: Sequence[str], count: int) -> tuple[tuple[ServedText, ...], str]:
    """Text that onnxruntime-genai makes of each prompt, and its name; none where nothing can judge it.

    Raises:
        ParityError: The runtime cannot load the folder.
        ResourceError: It is not installed.
    """
    with run.progress.stage("generation"):
        served = Served(run.subject.folder)
        if run.weights.unread:
            return (), served.where
        try:
            drawn = generation.served_texts(
                served, run.codec, run.tokenizer, asked, count, run.progress.advance
            )
        except ParityError as error:
            run.found += broken(Family.GENERATION.metrics, error, served.where)
            drawn = ()
        return drawn, served.where


def _levels(run: Run, model: Session) -> tuple[Measurement, ...]:
    """The parity levels against the original with the artifact's weights, which is released."""
    from llmc.validate.counted import Counted
    from llmc.validate.parity import Parity

    counted = Counted(model, run.plan.runs_of_levels, run.progress.advance)
    parity, large = Parity(counted, run.own, run.plan), is_large(run.subject.compiled)
    levels = allow_own_rounding(run.subject, run.own, parity, parity.measure(), large)
    run.own.release()
    return levels


def _not_comparable(unread: Sequence[str], where: str) -> tuple[Measurement, ...]:
    """Levels that need the original with the artifact's weights, where those cannot be read: no pass."""
    why = f"weights are stored in a form that is not read back: {len(unread)}, the first {unread[0]}"
    status = MeasurementStatus.NOT_MEASURED
    return tuple(unmeasured(m, status, why, where) for m in Metric if m.family.needs_own_weights)


def _measure_tasks(run: Run, model: Session) -> None:
    from llmc.validate.tasks import measure_tasks

    if run.subject.tasks is not None:
        with run.progress.stage("tasks"):
            run.found.append(measure_tasks(model, run.original, run.tokenizer, run.subject.tasks))


def _open_static(run: Run, slots: int | None = None) -> Rewindable:
    """The engine on its GPU, or its graph on the CPU, in the pieces that the engine would take.

    Args:
        slots: Slots of the KV cache that are needed; the graph is given no more.
    """
    accelerated = run.subject.accelerated
    return _open_graph(run, Arithmetic.SERVED, slots) if accelerated is None else accelerated.open()


def _interface_holds(interface: Interface, where: str) -> Measurement:
    told = f"{len(interface.inputs)} inputs and {len(interface.outputs)} outputs as stated"
    return mismatches(Metric.INTERFACE, (), told, where)
