"""Run the graph after each step of a compilation, and measure how each step changes the results."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llmc.backends import backend_of
from llmc.config import Metric, Target
from llmc.data import eval_text
from llmc.errors import UnsupportedError
from llmc.machine import release_memory
from llmc.pipeline.steps.compile import trace
from llmc.pipeline.steps.context import limit_context
from llmc.pipeline.steps.original import tokenize
from llmc.progress import Progress
from llmc.validate.measure import max_abs, measured

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmc.artifact.verdict import Measurement
    from llmc.checkpoint import Checkpoint
    from llmc.graph.model import Graph
    from llmc.validate.reference import Reference
    from llmc.validate.values import Values

#: Tokens of the prompt whose values are compared; all values are in memory.
PROMPT_TOKENS = 8


def short_prompt(checkpoint: Checkpoint) -> Any:
    """Return the first tokens of the built-in text, (PROMPT_TOKENS,) int64."""
    tokens, _ = tokenize(checkpoint.tokenizer(), eval_text())
    return tokens[:PROMPT_TOKENS]


def graphs_by_step(checkpoint: Checkpoint, target: Target, progress: Progress) -> Iterator[tuple[str, Graph]]:
    """Yield each step's name and the graph after it: always the same object, changed in place."""
    from llmc.backends.onnxruntime.minimums import split_minimums
    from llmc.passes import run_passes
    from llmc.quantize.quantizer import Observations

    graph = trace(checkpoint, target.dtype, progress)
    limit_context(graph, checkpoint.config, target)
    graph.bind(checkpoint.tensors, checkpoint.tied)
    yield "trace", graph
    for spec in target.passes:
        run_passes(graph, [spec])
        yield spec.name, graph
    backend_of(target).quantizer(target).apply(graph, Observations())
    split_minimums(graph)
    yield "quantize", graph


def values_of(graph: Graph, folder: Path, prompt: object) -> Values:
    """Write the graph into `folder`, run it on the prompt, and return its intermediate values."""
    import numpy as np

    from llmc.backends.model_file import write_model
    from llmc.validate.values import graph_values

    write_model(graph.model, folder)
    release_memory()
    return graph_values(folder, graph.interface(), np.asarray(prompt))


def measure_passes(
    checkpoint: Checkpoint, target: Target, original: Reference, progress: Progress
) -> Measurement:
    """Measure PASSES_MAX_ABS: largest difference of logits between the graphs before and after a pass.

    The traced graph is compared with the original. Every pass of the target is measured separately, so that
    two passes whose errors cancel are found.

    Args:
        original: The PyTorch model in float32, with the checkpoint's weights.

    Raises:
        ParityError: A graph cannot be run.
        UnsupportedError: The target has a KV cache of fixed length, which changes the graph's inputs.
    """
    if backend_of(target).capacity(target) is not None:
        raise UnsupportedError(
            f"the passes of {target.name} cannot be compared with each other: one of them gives the graph "
            "other inputs, for a KV cache of fixed length",
            hint="verify it without --each-pass, or another target of the model with it",
        )
    prompt = short_prompt(checkpoint)
    figures: dict[str, float] = {}
    before = original.logits(prompt, keep=len(prompt))[None]
    for step, graph in graphs_by_step(checkpoint, target, progress):
        if step == "quantize":
            break
        with progress.stage(step), TemporaryDirectory() as folder:
            logits = values_of(graph, Path(folder), prompt).arrays["logits"]
        figures[step] = max_abs(logits, before[:, -logits.shape[1] :], f"step {step}")
        before = logits
    worst = max(figures, key=lambda name: figures[name])
    detail = (
        f"the trace compared with the original, {len(figures) - 1} passes, each with the graph before it;"
        f" the worst is {worst}"
    )
    value = max(figures.values())
    return measured(Metric.PASSES_MAX_ABS, value, detail, "onnxruntime CPUExecutionProvider", figures)
