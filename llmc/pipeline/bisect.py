"""`llmc bisect`: where an artifact's numbers part from the original's, and which step did it."""

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
from llmc.progress import Progress
from llmc.records import Record

if TYPE_CHECKING:
    from llmc.validate.values import ValueDifference, Values

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


def _divergence(step: str, found: ValueDifference) -> Divergence:
    place = found.place
    return Divergence(
        step=step,
        layer=place.layer,
        operator=place.operator,
        value=place.value,
        module=place.module,
        relative=found.relative,
    )
