"""`llmc bisect`: where an artifact's numbers part from the original's, and which step did it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from llmc.artifact.integrity import require_vouched
from llmc.backends import backend_of
from llmc.config import Dtype, Metric, Quantization, Target
from llmc.errors import LlmcError, UnsupportedError
from llmc.machine import release_memory
from llmc.pipeline.steps.compile import trace
from llmc.pipeline.steps.context import limit_context
from llmc.pipeline.steps.original import open_pair, read_text, tokenize
from llmc.pipeline.steps.prune import reopen
from llmc.progress import Progress
from llmc.records import Record
from llmc.validate.measure import max_abs, measured

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmc.artifact.verdict import Measurement
    from llmc.checkpoint import Checkpoint
    from llmc.graph.model import Graph
    from llmc.validate.reference import Reference
    from llmc.validate.values import Difference, Values

#: Tokens of the prompt whose values are compared: all of them are kept.
PROMPT_TOKENS = 8
#: Largest difference over largest value that another order of float32 sums may make.
TOLERANCE = 1e-3


class Divergence(Record):
    """Where the numbers part.

    Args:
        step: What was done between the last right numbers and the first wrong ones: `trace`, a pass,
            or `artifact` for what is in the files and in no graph that the compiler makes.
        layer: Decoder layer; None outside of the layers.
        operator: Of the graph after the step.
        value: Its output.
        module: The original's module that it belongs to, where the trace knows it.
        relative: Largest difference over the largest value.
    """

    step: str
    layer: int | None
    operator: str
    value: str
    module: str | None
    relative: float


class BisectResult(Record):
    """The first divergence, and the steps that were found right before it."""

    right: tuple[str, ...]
    divergence: Divergence | None

    def render(self) -> str:
        """A few lines for a terminal."""
        lines = [f"right  {step}" for step in self.right]
        found = self.divergence
        if found is None:
            return "\n".join([*lines, "no step changed the numbers"])
        place = "outside of the layers" if found.layer is None else f"layer {found.layer}"
        module = "" if found.module is None else f", module {found.module}"
        return "\n".join(
            [
                *lines,
                f"WRONG  {found.step}: {place}, operator {found.operator}, value {found.value}{module},"
                f" off by {found.relative:.3g} of its largest value",
            ]
        )

    def failure(self) -> LlmcError | None:
        """Finding the place is what was asked for."""
        return None


def bisect(
    path: Path,
    against: str | None,
    progress: Progress,
    *,
    force: bool = False,
    adapter: str | None = None,
) -> BisectResult:
    """Compare intermediate values step by step: original, trace, each pass, files of the artifact.

    Every step's graph is written to a temporary folder and run on one short prompt; only the values of
    two steps are held at a time. Quantization is no step, nor is pruning: what they cost is for `verify` to
    say, and the original here is what pruning left of it.

    Args:
        path: An artifact.
        against: The original; None for the one that the manifest names.
        force: Take an original that the artifact was not built from.
        adapter: As `open_pair`.

    Raises:
        ParityError: A graph cannot be run.
        UnsupportedError: The target computes in another type than the original.
    """
    from llmc.validate.values import first_difference, first_module_difference, graph_values, module_values

    with progress.stage("artifact"):
        artifact, original, _ = open_pair(path, against, force=force, adapter=adapter)
        require_vouched(artifact)
        target = artifact.manifest.target
        if target.dtype is not Dtype.FLOAT32:
            raise UnsupportedError(
                f"llmc bisect holds values in float32 against the original's, and {target.name} computes in "
                f"{target.dtype.value}, whose rounding it would find first",
                hint="build the model for cpu-fp32, and bisect that",
            )
        tokens, _ = tokenize(original.tokenizer(), read_text(()))
        prompt = tokens[:PROMPT_TOKENS]
    checkpoint = reopen(original, target, path, progress)
    with progress.stage("original"):
        modules = module_values(checkpoint.fill_reference(), prompt)
    release_memory()
    right: list[str] = []
    before: Values | None = None
    for step, graph in _steps(checkpoint, target, progress):
        with progress.stage(step), TemporaryDirectory() as folder:
            values = _values_of(graph, Path(folder), prompt)
        if step == "quantize":
            before = values
            continue
        found = (
            first_module_difference(modules, values, TOLERANCE)
            if before is None
            else first_difference(before, values, TOLERANCE)
        )
        if found is not None:
            return BisectResult(right=tuple(right), divergence=_divergence(step, found))
        right.append(step)
        before = values
    with progress.stage("files"):
        values = graph_values(path, artifact.manifest.interface, prompt)
    found = None if before is None else first_difference(before, values, TOLERANCE)
    if found is not None:
        return BisectResult(right=tuple(right), divergence=_divergence("artifact", found))
    return BisectResult(right=(*right, "artifact"), divergence=None)


def measure_passes(
    checkpoint: Checkpoint, target: Target, original: Reference, progress: Progress
) -> Measurement:
    """PASSES_MAX_ABS: largest difference of logits between the graph before a pass and after it.

    The traced graph is held against the original. Every pass of the target is measured on its own, so that
    two that undo each other's fault are found.

    Args:
        original: PyTorch's model in float32, with the checkpoint's weights.

    Raises:
        ParityError: A graph cannot be run.
        UnsupportedError: The target has a KV cache of fixed length, which changes what a graph takes.
    """
    if backend_of(target).capacity(target) is not None:
        raise UnsupportedError(
            f"the passes of {target.name} cannot be held against each other: one of them gives the graph "
            "other inputs, for a KV cache of fixed length",
            hint="verify it without --each-pass, or another target of the model with it",
        )
    tokens, _ = tokenize(checkpoint.tokenizer(), read_text(()))
    prompt = tokens[:PROMPT_TOKENS]
    figures: dict[str, float] = {}
    before = original.logits(prompt, keep=len(prompt))[None]
    for step, graph in _steps(checkpoint, target, progress):
        if step == "quantize":
            break
        with progress.stage(step), TemporaryDirectory() as folder:
            logits = _values_of(graph, Path(folder), prompt).arrays["logits"]
        figures[step] = max_abs(logits, before[:, -logits.shape[1] :], f"step {step}")
        before = logits
    worst = max(figures, key=lambda name: figures[name])
    detail = (
        f"the trace against the original, {len(figures) - 1} passes, each against the graph before it;"
        f" the worst is {worst}"
    )
    value = max(figures.values())
    return measured(Metric.PASSES_MAX_ABS, value, detail, "onnxruntime CPUExecutionProvider", figures)


def _steps(checkpoint: Checkpoint, target: Target, progress: Progress) -> Iterator[tuple[str, Graph]]:
    """The graph after each step, always the same object, changed in place."""
    from llmc.backends.onnxruntime.minimums import split_minimums
    from llmc.passes import run_passes
    from llmc.quantize.linear import quantize_weights

    graph = trace(checkpoint, target.dtype, progress)
    limit_context(graph, checkpoint.config, target)
    graph.bind(checkpoint.tensors, checkpoint.tied)
    yield "trace", graph
    for spec in target.passes:
        run_passes(graph, [spec])
        yield spec.name, graph
    quantize_weights(graph, target.quantize or Quantization(accuracy_level=0, rules=()), target.dtype)
    split_minimums(graph)
    yield "quantize", graph


def _values_of(graph: Graph, folder: Path, prompt: object) -> Values:
    import numpy as np

    from llmc.backends.model_file import write_model
    from llmc.validate.values import graph_values

    write_model(graph.model, folder)
    release_memory()
    return graph_values(folder, graph.interface(), np.asarray(prompt))


def _divergence(step: str, found: Difference) -> Divergence:
    place = found.place
    return Divergence(
        step=step,
        layer=place.layer,
        operator=place.operator,
        value=place.value,
        module=place.module,
        relative=found.relative,
    )
