"""The parity gate: what `build` runs before it commits an artifact, and `verify` again later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.config import Gate, Metric, Target
from llmc.errors import ConfigError, ParityError
from llmc.graph.switches import rope_switches, trained_lengths
from llmc.machine import available_memory, release_memory
from llmc.pipeline.bisect import measure_passes
from llmc.pipeline.loaders import measure_loaders
from llmc.pipeline.original import read_text, remember, tokenize
from llmc.pipeline.rounding import allow_own_rounding, digest_roundings, load_rounded, plan_roundings
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.artifact.engine import EngineRecord
    from llmc.artifact.latency import Latency
    from llmc.artifact.manifest import WeightRecord
    from llmc.artifact.text import TextCodec, TextRecord
    from llmc.artifact.verdict import Measurement, Verdict
    from llmc.checkpoint import Checkpoint
    from llmc.graph.interface import Interface
    from llmc.graph.static_session import StaticSession
    from llmc.graph.weights import Rows
    from llmc.validate.reference import Reference, TorchModel
    from llmc.validate.remembered import RememberedModel
    from llmc.validate.session import Session
    from llmc.validate.tasks import Tasks
    from llmc.validate.weights import WeightParity

LATENCY = frozenset({Metric.TTFT_RATIO, Metric.INTER_TOKEN_RATIO, Metric.PREVIOUS_RATIO})


@dataclass(frozen=True)
class GateResult:
    """Everything that was measured, and the target's thresholds held against it."""

    measurements: tuple[Measurement, ...]
    verdict: Verdict
    latency: Latency | None = None


@dataclass(frozen=True)
class Subject:
    """What is measured, and against what.

    Args:
        folder: model.onnx, genai_config.json and the tokenizer.
        interface: What the graph is said to take and give.
        target: Whose gates are held.
        threads: Intra-op threads of the artifact; None leaves them to the runtime.
        checkpoint: The original.
        model_digest: Its digest.
        sources: What each weight is made of, by the name of its initializer before quantization.
        compiled: What was compiled: the original, or what pruning left of it.
        text: How the artifact turns text into tokens.
        damaged: What is wrong with the files by the manifest.
        engine: An engine to execute here; None measures the graph.
        tasks: Multiple-choice tasks to answer as well.
        weights: How every matrix is stored.
    """

    folder: Path
    interface: Interface
    target: Target
    threads: int | None
    checkpoint: Checkpoint
    model_digest: str
    sources: Mapping[str, Rows]
    compiled: Checkpoint
    text: TextRecord
    damaged: Sequence[str] = ()
    engine: EngineRecord | None = None
    tasks: Tasks | None = None
    weights: Sequence[WeightRecord] = ()

    @property
    def runtime(self) -> str:
        """What executes it."""
        return "onnxruntime" if self.engine is None else self.engine.library


def parity_gates(target: Target) -> tuple[Gate, ...]:
    """The target's gates on numbers."""
    return tuple(gate for gate in target.gates if gate.metric not in LATENCY)


def latency_gates(target: Target) -> tuple[Gate, ...]:
    """The target's gates on time."""
    return tuple(gate for gate in target.gates if gate.metric in LATENCY)


def measure_parity(
    subject: Subject, eval_text: Sequence[str], progress: Progress, *, each_pass: bool = False
) -> GateResult:
    """Measure an artifact against the original, and hold the target's parity gates.

    Logits are compared twice. Quality is that of the artifact as it is served beside the original as
    it is. The parity levels ask whether the graph is right whatever its weights lost: the original is
    given the artifact's own weights, and quantized products are computed in float32 on both sides, so
    that a tight bound holds for every target. What pruning left out of the model is left out of it there too.

    All of it is taken on the CPU, unless the subject names an engine for the GPU at hand. Of what is built
    for a GPU that is the graph, not the GPU's kernels.

    Args:
        eval_text: Files with the user's text; none for the one that ships.
        each_pass: Hold every pass to the target's bound on prefill, the graph after it against the graph
            before it.

    Raises:
        ConfigError: The text cannot be read, or is too short.
        ResourceError: A runtime is missing.
    """
    from llmc.validate.gates import evaluate
    from llmc.validate.measure import broken

    measurements: list[Measurement] = []
    gates = parity_gates(subject.target)
    if each_pass:
        whole = _remember(subject, "", lambda: load_original(subject.compiled))
        measurements.append(measure_passes(subject.compiled, subject.target, whole, progress))
        gates += tuple(
            gate.model_copy(update={"metric": Metric.PASSES_MAX_ABS})
            for gate in gates
            if gate.metric is Metric.PREFILL_MAX_ABS
        )
    measure = _measure_static if subject.interface.static_cache else _measure
    try:
        measure(subject, eval_text, progress, measurements)
    except ParityError as error:
        taken = {m.metric for m in measurements}
        left = tuple(gate.metric for gate in gates if gate.metric not in taken)
        measurements += broken(left, error, subject.runtime)
    return GateResult(tuple(measurements), evaluate(gates, measurements))


def _measure(subject: Subject, eval_text: Sequence[str], progress: Progress, made: list[Measurement]) -> None:
    """Append each measurement to `made` as it is taken.

    Raises:
        ParityError: The artifact cannot be loaded, so that nothing further can be measured.
    """
    from llmc.data import prompts
    from llmc.validate import generation
    from llmc.validate.blank import BlankSession
    from llmc.validate.measure import broken, measured, mismatches
    from llmc.validate.parity import Parity
    from llmc.validate.quality import YARDSTICK_WINDOWS, measure_quality, plan_windows
    from llmc.validate.served import Served
    from llmc.validate.session import OrtModel, shares_buffer
    from llmc.validate.settings import compare_settings, describe_original
    from llmc.validate.tokens import measure_tokens

    folder, checkpoint = subject.folder, subject.checkpoint
    text = read_text(eval_text)
    with progress.stage("files"):
        made.append(
            mismatches(Metric.FILES, subject.damaged, "all as the manifest says", "sha256, from the files")
        )
        tokenizer = checkpoint.tokenizer()
        tokens, start = tokenize(tokenizer, text)
    made.append(measure_loaders(checkpoint, subject.model_digest, progress))
    heads = subject.compiled.config.get_text_config(decoder=True).num_attention_heads
    switches, lengths = rope_switches(checkpoint.config), trained_lengths(checkpoint.config)
    with progress.stage("settings"):
        stated = describe_original(checkpoint.config, checkpoint.generation_config(), tokenizer)
        made.append(compare_settings(folder, stated, subject.interface))
    with progress.stage("weights"):
        weights = _compare_weights(subject)
        made += weights.measurements
    share = shares_buffer(folder)

    def session(*, exact: bool) -> OrtModel:
        return OrtModel(folder, subject.interface, threads=subject.threads, share_buffer=share, exact=exact)

    with progress.stage("tokenizer"):
        try:
            where = session(exact=False).where
        except ParityError as error:
            made.append(measured(Metric.INTERFACE, 1.0, error.fact, "onnxruntime"))
            raise
        made.append(_interface_holds(subject.interface, where))
        served = Served(folder, subject.text)
        codec = _open_codec(subject)
        read_by = f"{served.where}, and transformers"
        made += measure_tokens(folder, codec, served.tokenizer, tokenizer, text, prompts(), read_by)
    count = generation.new_tokens(subject.interface.max_length)
    asked = generation.fitting_prompts(prompts(), tokenizer, subject.interface.max_length)
    drawn: tuple[generation.ServedText, ...] = ()
    if not weights.unread:
        with progress.stage("generation"):
            try:
                drawn = generation.served_texts(served, codec, tokenizer, asked, count)
            except ParityError as error:
                made += broken(generation.METRICS, error, served.where)
    served_where = served.where
    del served  # out of memory before the original comes in
    release_memory()
    original = remember(checkpoint, subject.model_digest, "", lambda: load_original(subject.checkpoint))
    with progress.stage("original"):
        windows = plan_windows(subject.interface, tokens, start)
        windows.prepare(original)
        texts = generation.original_texts(original, tokenizer, asked, stated.stop, count)
    release_memory()
    own = _own(subject, original, weights)
    rounding = None
    if weights.unread:
        made += _not_comparable(weights.unread, where)
        original.release()
    else:
        with progress.stage("original with the artifact's weights"):
            if drawn:
                made += generation.measure_generation(drawn, texts, own, stated.stop, served_where)
            Parity(BlankSession(subject.interface), own, tokens, heads, switches, lengths).measure()
            original.release()
        rounding = _rounding(subject, own)
        if rounding is not None:
            with progress.stage("original with rounded weights"):
                windows.sample(YARDSTICK_WINDOWS).prepare(rounding)
                rounding.release()
        own.release()
        release_memory()
        with progress.stage("parity"):
            levels = Parity(session(exact=True), own, tokens, heads, switches, lengths).measure()
            made += allow_own_rounding(subject, own, tokens, levels, _is_large(subject.compiled))
        own.release()
    release_memory()
    model = session(exact=False)
    with progress.stage("quality"):
        made += measure_quality(model, original, windows, rounding=rounding)
    _measure_tasks(subject, model, original, progress, made)


def _open_codec(subject: Subject) -> TextCodec:
    """The artifact's tokenizer, as `llmc run` uses it.

    Raises:
        ParityError: It cannot be read.
    """
    from llmc.artifact.text import TextCodec

    try:
        return TextCodec(subject.folder, subject.text)
    except ConfigError as error:
        raise ParityError(error.fact) from error


def _not_comparable(unread: Sequence[str], where: str) -> tuple[Measurement, ...]:
    """Levels that need the original with the artifact's weights, where those cannot be read: no pass."""
    from llmc.artifact.verdict import MeasurementStatus
    from llmc.validate.measure import unmeasured

    why = f"weights are stored in a form that is not read back: {len(unread)}, the first {unread[0]}"
    areas = ("prefill", "chunks", "decode", "ragged", "window", "generate")
    status = MeasurementStatus.NOT_MEASURED
    return tuple(unmeasured(m, status, why, where) for m in Metric if m.value.partition(".")[0] in areas)


def _measure_static(
    subject: Subject, eval_text: Sequence[str], progress: Progress, made: list[Measurement]
) -> None:
    """`_measure` for the graph that engines are parsed from, and the engine where its GPU is at hand.

    Parity is the graph's, in float32 and with the artifact's weights on both sides. Quality and the choice of
    tokens step by step are the engine's, or else those of the graph in its own types.

    Raises:
        ParityError: TensorRT or onnxruntime cannot load it.
    """
    from llmc.data import prompts
    from llmc.validate.blank import BlankSession
    from llmc.validate.measure import measured, mismatches
    from llmc.validate.parity import Parity
    from llmc.validate.quality import measure_quality, plan_windows
    from llmc.validate.static_session import StaticOrtModel
    from llmc.validate.tokens import measure_tokens

    checkpoint = subject.checkpoint
    text = read_text(eval_text)
    made.append(
        mismatches(Metric.FILES, subject.damaged, "all as the manifest says", "sha256, from the files")
    )
    made.append(measure_loaders(checkpoint, subject.model_digest, progress))
    with progress.stage("weights"):
        weights = _compare_weights(subject)
        made += weights.measurements
    with progress.stage("tokenizer"):
        tokenizer = checkpoint.tokenizer()
        tokens, start = tokenize(tokenizer, text)
        codec = _open_codec(subject)
        made += measure_tokens(subject.folder, codec, None, tokenizer, text, prompts(), "transformers")
    original = remember(checkpoint, subject.model_digest, "", lambda: load_original(subject.checkpoint))
    windows = plan_windows(subject.interface, tokens, start)
    heads = subject.compiled.config.get_text_config(decoder=True).num_attention_heads
    switches, lengths = rope_switches(checkpoint.config), trained_lengths(checkpoint.config)
    rows = _most_rows(subject)
    with progress.stage("original"):
        windows.prepare(original)
        if subject.engine is not None:
            Parity(BlankSession(subject.interface), original, tokens, heads, switches, lengths, rows).decode()
    own = _own(subject, original, weights)
    with progress.stage("original with the artifact's weights"):
        if not weights.unread:
            Parity(BlankSession(subject.interface), own, tokens, heads, switches, lengths).measure()
        original.release()
        own.release()
    release_memory()
    with progress.stage("parity"):
        try:
            graph = StaticOrtModel(subject.folder, subject.interface, threads=subject.threads, exact=True)
        except ParityError as error:
            made.append(measured(Metric.INTERFACE, 1.0, error.fact, "onnxruntime"))
            raise
        made.append(_interface_holds(subject.interface, graph.where))
        if weights.unread:
            levels = _not_comparable(weights.unread, graph.where)
        else:
            levels = Parity(graph, own, tokens, heads, switches, lengths).measure()
            levels = allow_own_rounding(subject, own, tokens, levels, _is_large(subject.compiled))
        own.release()
    del graph
    release_memory()
    model = _open_static(subject)
    if subject.engine is not None:
        with progress.stage("engine"):
            steps = Parity(model, original, tokens, heads, switches, lengths, rows).decode()
            original.release()
        levels = tuple(m for m in levels if m.metric is not Metric.DECODE_TOP1)
        levels += tuple(m for m in steps if m.metric is Metric.DECODE_TOP1)
    made += levels
    with progress.stage("quality"):
        made += measure_quality(model, original, windows, rows)
    _measure_tasks(subject, model, original, progress, made)


def _measure_tasks(
    subject: Subject, model: Session, original: Reference, progress: Progress, made: list[Measurement]
) -> None:
    from llmc.validate.tasks import measure_tasks

    if subject.tasks is not None:
        with progress.stage("tasks"):
            made.append(measure_tasks(model, original, subject.checkpoint.tokenizer(), subject.tasks))


def _most_rows(subject: Subject) -> int | None:
    """Most rows of a batch that an engine takes; None for its graph, which takes any number."""
    settings = subject.target.engine
    return None if subject.engine is None or settings is None else settings.batch.most


def _open_static(subject: Subject) -> StaticSession:
    """The engine on its GPU, or its graph on the CPU, in the pieces that the engine would take."""
    from llmc.backends.tensorrt_session import EngineSession
    from llmc.validate.static_session import StaticOrtModel

    if subject.engine is not None:
        return EngineSession(subject.folder, subject.engine, subject.interface)
    settings = subject.target.engine
    most = None if settings is None else settings.prefill.most
    return StaticOrtModel(subject.folder, subject.interface, threads=subject.threads, most=most)


def _interface_holds(interface: Interface, where: str) -> Measurement:
    from llmc.validate.measure import mismatches

    told = f"{len(interface.inputs)} inputs and {len(interface.outputs)} outputs as stated"
    return mismatches(Metric.INTERFACE, (), told, where)


def _compare_weights(subject: Subject) -> WeightParity:
    from llmc.validate.measure import broken
    from llmc.validate.weights import METRICS, WeightParity, compare_weights

    try:
        return compare_weights(subject.folder, subject.sources)
    except ParityError as error:
        return WeightParity(broken(METRICS, error, "numpy, from the files"), "", ())


def load_original(checkpoint: Checkpoint) -> TorchModel:
    """The original, in memory if there is room for it, else streamed from disk."""
    from llmc.validate.reference import TorchModel

    return TorchModel(
        checkpoint.stream_reference({}) if _is_large(checkpoint) else checkpoint.fill_reference()
    )


def _own(subject: Subject, original: RememberedModel, weights: WeightParity) -> RememberedModel:
    """The original with the artifact's own weights; the original itself where nothing was lost."""
    if not weights.digest and not subject.compiled.altered:
        return original

    def load() -> TorchModel:
        loaded = original.release()
        return _load_own(None if subject.compiled.altered else loaded, subject, weights)

    return _remember(subject, weights.digest, load)


def _rounding(subject: Subject, own: RememberedModel) -> RememberedModel | None:
    """The yardstick of the target, if it has one, in the memory of `own`, which is let go of."""
    plans = plan_roundings(subject.target, subject.weights, subject.sources)
    if not plans:
        return None

    def load() -> TorchModel:
        loaded = own.release()
        if _is_large(subject.compiled):
            return load_rounded(None, subject.compiled, subject.sources, plans)
        return load_rounded(
            loaded or load_original(subject.compiled), subject.compiled, subject.sources, plans
        )

    return _remember(subject, digest_roundings(plans), load)


def _remember(subject: Subject, weights_digest: str, load: Callable[[], TorchModel]) -> RememberedModel:
    """`remember` for what was compiled."""
    digest = f"{subject.model_digest}{subject.compiled.altered}"
    return remember(subject.compiled, digest, weights_digest, load)


def _load_own(loaded: TorchModel | None, subject: Subject, weights: WeightParity) -> TorchModel:
    """The original with the artifact's own weights, put into `loaded` if that is the original."""
    from llmc.validate.reference import TorchModel
    from llmc.validate.weights import StoredParameters, parameters, read_stored

    changed = {name: subject.sources[name] for name in weights.changed}
    stored = read_stored(subject.folder, changed)
    if _is_large(subject.compiled):
        return TorchModel(subject.compiled.stream_reference(StoredParameters(changed, stored)))
    model = loaded or load_original(subject.compiled)
    for name, matrix in stored.items():
        model.set_parameters(dict(parameters(changed[name], matrix.whole())))
    return model


def _is_large(checkpoint: Checkpoint) -> bool:
    """Whether the original in float32 would take more than half of the memory that is free."""
    free = available_memory()
    return free is not None and checkpoint.reference_bytes() > free // 2
