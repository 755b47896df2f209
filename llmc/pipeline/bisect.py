"""Implement `llmc bisect`: find where results first diverge from the original's, and in which step."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from llmc.artifact.store.integrity import require_vouched
from llmc.config import Dtype
from llmc.errors import LlmcError, UnsupportedError
from llmc.machine import release_memory
from llmc.pipeline.steps.original import open_pair
from llmc.pipeline.steps.prune import reopen
from llmc.pipeline.steps.stepwise import graphs_by_step, short_prompt, values_of
from llmc.pipeline.steps.stored import require_graph
from llmc.progress import Progress
from llmc.records import Record

if TYPE_CHECKING:
    from llmc.validate.values import ValueDifference, Values

#: Largest difference, relative to the largest value, that another order of float32 sums may cause.
TOLERANCE = 1e-3


class Divergence(Record):
    """The place where results first diverge.

    Args:
        step: The step between the last right values and the first wrong ones: `trace`, a pass, or `artifact`
            if the files differ from every graph that the compiler builds.
        layer: Decoder layer; None outside of the layers.
        operator: Operator in the graph after the step.
        value: The operator's output.
        module: The original's module that it belongs to, if the trace records it.
        relative: Largest difference divided by the largest value.
    """

    step: str
    layer: int | None
    operator: str
    value: str
    module: str | None
    relative: float


class BisectResult(Record):
    """The first divergence, and the steps before it whose results are right."""

    right: tuple[str, ...]
    divergence: Divergence | None

    def render(self) -> str:
        """Return a few lines for a terminal."""
        lines = [f"right  {step}" for step in self.right]
        divergence = self.divergence
        if divergence is None:
            return "\n".join([*lines, "no step changed the numbers"])
        place = "outside of the layers" if divergence.layer is None else f"layer {divergence.layer}"
        module = "" if divergence.module is None else f", module {divergence.module}"
        return "\n".join(
            [
                *lines,
                f"WRONG  {divergence.step}: {place}, operator {divergence.operator}, "
                f"value {divergence.value}{module}, off by {divergence.relative:.3g} of its largest value",
            ]
        )

    def failure(self) -> LlmcError | None:
        """Return None: finding the place is the purpose of the command."""
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

    Every step's graph is written to a temporary folder and run on a short prompt; only the values of two
    steps are in memory at a time. Quantization and pruning are not steps: `verify` measures their cost, and
    the original here is the pruned model.

    Args:
        path: An artifact.
        against: The original; None for the model that the manifest names.
        force: Accept an original that the artifact was not built from.
        adapter: As `open_pair`.

    Raises:
        ParityError: A graph cannot be run.
        UnsupportedError: The target computes in another type than the original, or the artifact is a
            checkpoint.
    """
    from llmc.validate.values import first_difference, first_module_difference, graph_values, module_values

    with progress.stage("artifact"):
        artifact, original, _ = open_pair(path, against, force=force, adapter=adapter)
        require_graph(artifact, "llmc bisect compares the values of")
        require_vouched(artifact)
        target = artifact.manifest.target
        if target.dtype is not Dtype.FLOAT32:
            raise UnsupportedError(
                f"llmc bisect compares values in float32 with the original's, but {target.name} computes in "
                f"{target.dtype.value}, whose rounding would be found first",
                hint="build the model for cpu-fp32, and bisect that",
            )
        prompt = short_prompt(original)
    checkpoint = reopen(original, target, path, progress)
    with progress.stage("original"):
        modules = module_values(checkpoint.fill_reference(), prompt)
    release_memory()
    right: list[str] = []
    before: Values | None = None
    for step, graph in graphs_by_step(checkpoint, target, progress):
        with progress.stage(step), TemporaryDirectory() as folder:
            values = values_of(graph, Path(folder), prompt)
        if step == "quantize":
            before = values
            continue
        difference = (
            first_module_difference(modules, values, TOLERANCE)
            if before is None
            else first_difference(before, values, TOLERANCE)
        )
        if difference is not None:
            return BisectResult(right=tuple(right), divergence=_divergence(step, difference))
        right.append(step)
        before = values
    with progress.stage("files"):
        values = graph_values(path, artifact.manifest.interface, prompt)
    difference = None if before is None else first_difference(before, values, TOLERANCE)
    if difference is not None:
        return BisectResult(right=tuple(right), divergence=_divergence("artifact", difference))
    return BisectResult(right=(*right, "artifact"), divergence=None)


def _divergence(step: str, difference: ValueDifference) -> Divergence:
    place = difference.place
    return Divergence(
        step=step,
        layer=place.layer,
        operator=place.operator,
        value=place.value,
        module=place.module,
        relative=difference.relative,
    )
