"""Say which server loads which quantized checkpoint, before one is built.

`support_table.py` has the table and `support_terms.py` its terms; here are the questions that a target puts
to it. What a server does with a scheme was seen by running it, by letting it load a checkpoint, or by reading
its source; each row says which.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.config import (
    CacheType,
    CheckpointFormat,
    EngineScheme,
    ServedCheckpoint,
    Target,
    WeightFormat,
    WeightScheme,
)
from llmc.errors import ConfigError, count_names
from llmc.servers.support_experts import EXPERTS
from llmc.servers.support_models import ServedModel, of_model
from llmc.servers.support_table import CACHES, FOLDERS, SCHEMES, VERSIONS
from llmc.servers.support_terms import FolderSupport, MatrixKind, Runtime, SchemeSupport, Status, Treatment


@dataclass(frozen=True)
class Matrix:
    """A matrix that a target quantizes.

    Args:
        name: Name of its parameter.
        shape: (outputs, inputs); of one expert's matrix for experts.
        is_expert: Whether it is a matrix of experts.
    """

    name: str
    shape: tuple[int, int]
    scheme: WeightScheme | EngineScheme
    is_expert: bool = False


def kind_of(scheme: WeightScheme | EngineScheme) -> MatrixKind:
    """Return the kind of a scheme's matrices."""
    if isinstance(scheme, WeightScheme):
        return MatrixKind.INT4 if scheme.bits == 4 else MatrixKind.INT8
    by_activations = {
        WeightFormat.INT4: {"float": MatrixKind.INT4},
        WeightFormat.INT8: {
            "float": MatrixKind.INT8,
            "dynamic": MatrixKind.INT8_DYNAMIC,
            "static": MatrixKind.INT8_STATIC,
        },
        WeightFormat.FP8: {
            "float": MatrixKind.FP8,
            "dynamic": MatrixKind.FP8_DYNAMIC,
            "static": MatrixKind.FP8_STATIC,
        },
        WeightFormat.NVFP4: {"float": MatrixKind.NVFP4_WEIGHTS, "dynamic": MatrixKind.NVFP4},
    }
    kind = by_activations[scheme.format][scheme.activations]
    return MatrixKind.FP8_TENSOR if kind is MatrixKind.FP8_STATIC and scheme.scale_per == "tensor" else kind


def describe_kind(scheme: WeightScheme | EngineScheme) -> str:
    """Return a scheme for people, such as `int4 weights by groups of 128, with zero points`."""
    text = kind_of(scheme).value
    if scheme.block_size is not None:
        text += f" by groups of {scheme.block_size}"
    return text if scheme.symmetric else f"{text}, with zero points"


def _section_of(target: Target) -> ServedCheckpoint:
    """Return the section `checkpoint` of a target.

    Raises:
        ConfigError: The target is not a checkpoint.
    """
    if target.checkpoint is None:
        raise ConfigError(
            f"target {target.name} makes no checkpoint, so no server loads what it builds",
            hint="llmc targets lists the targets of backend checkpoint",
        )
    return target.checkpoint


def schemes_of(target: Target) -> tuple[WeightScheme | EngineScheme, ...]:
    """Return the distinct schemes that the rules of a checkpoint's target can give to a matrix.

    Raises:
        ConfigError: The target is not a checkpoint.
    """
    found: list[WeightScheme | EngineScheme] = []
    if target.quantize is not None:
        found += [rule.scheme for rule in target.quantize.rules if rule.scheme is not None]
        found += () if target.quantize.allocation is None else target.quantize.allocation.choices
    found += [rule.scheme for rule in _section_of(target).weights if rule.scheme is not None]
    return tuple({describe_kind(scheme): scheme for scheme in found}.values())


def treatments(runtime: Runtime, target: Target, matrices: Sequence[Matrix] = ()) -> tuple[Treatment, ...]:
    """Return what a runtime does with each scheme of a target, with their mixture, its KV cache and matrices.

    Args:
        matrices: The matrices of a model that the target quantizes; only those that are refused by their
            shape get a treatment.

    Raises:
        ConfigError: The target is not a checkpoint.
    """
    section, schemes = _section_of(target), schemes_of(target)
    return (
        *(_of_scheme(runtime, section, scheme) for scheme in schemes),
        *_of_folder(runtime, section, len(schemes)),
        *_of_cache(runtime, target, section),
        *_of_shapes(runtime, section, (matrix for matrix in matrices if not matrix.is_expert)),
        *_of_experts(runtime, section, matrices),
    )


def of_experts(runtime: Runtime, target: Target, scheme: WeightScheme | EngineScheme) -> Treatment:
    """Return what a runtime does with experts of a scheme.

    Raises:
        ConfigError: The target is not a checkpoint.
    """
    section = _section_of(target)
    return _of_row(runtime, f"experts in {describe_kind(scheme)}", section, scheme, EXPERTS)


def why_not(runtime: Runtime, target: Target, matrices: Sequence[Matrix] = ()) -> str | None:
    """Return why a runtime does not load what a target builds, or reads it wrongly; None if neither is known.

    Raises:
        ConfigError: The target is not a checkpoint.
    """
    for treatment in treatments(runtime, target, matrices):
        if treatment.refuses:
            return f"{treatment.subject} {_SAYS[treatment.status]} {runtime.value}: {treatment.reason}"
    return None


def takers(
    target: Target, matrices: Sequence[Matrix] = (), model: ServedModel | None = None
) -> dict[Status, tuple[Runtime, ...]]:
    """Return the runtimes that load all of a target: those that compute on a CPU, and those on a GPU only.

    Args:
        matrices: As for `treatments`.
        model: The model; None to ask about the target alone.

    Raises:
        ConfigError: The target is not a checkpoint.
    """
    by_status: dict[Status, tuple[Runtime, ...]] = {Status.SERVED: (), Status.GPU_ONLY: ()}
    for runtime in Runtime:
        of_this = () if model is None else of_model(runtime, model)
        found = {each.status for each in (*treatments(runtime, target, matrices), *of_this)}
        if found <= {Status.SERVED, Status.GPU_ONLY}:
            status = Status.GPU_ONLY if Status.GPU_ONLY in found else Status.SERVED
            by_status[status] += (runtime,)
    return by_status


def describe_takers(target: Target, matrices: Sequence[Matrix] = (), model: ServedModel | None = None) -> str:
    """Return one line on the servers that take what a target builds, and on those that read it wrongly.

    Args:
        matrices: As for `treatments`.
        model: As for `takers`.

    Raises:
        ConfigError: The target is not a checkpoint.
    """
    found = takers(target, matrices, model)
    here, gpu = (", ".join(found[status]) or "none" for status in (Status.SERVED, Status.GPU_ONLY))
    line = f"servers that take it: {here} on a CPU; {gpu} on a GPU only"
    wrong = [
        runtime
        for runtime in Runtime
        if any(treatment.status is Status.WRONG for treatment in treatments(runtime, target, matrices))
    ]
    return line if not wrong else f"{line}; do not give it to {', '.join(wrong)}, which would read it wrongly"


def markdown_table(
    table: Mapping[tuple[Runtime, CheckpointFormat], Mapping[MatrixKind, SchemeSupport]] = SCHEMES,
) -> str:
    """Return a table of servers in Markdown, a row for each kind of matrices in each format.

    A cell has the status, how it was found, and what limits it.
    """
    runtimes = [runtime for runtime in Runtime if any(of is runtime for of, _ in table)]
    lines = ["| format | matrices | " + " | ".join(runtime.value for runtime in runtimes) + " |"]
    lines.append("|---" * (2 + len(runtimes)) + "|")
    for form in CheckpointFormat:
        for kind in MatrixKind:
            rows = [table.get((runtime, form), {}).get(kind) for runtime in runtimes]
            if any(row is not None for row in rows):
                cells = " | ".join("" if row is None else _cell(row) for row in rows)
                lines.append(f"| {form.value} | {kind.value} | {cells} |")
    return "\n".join(lines)


def write_table(file: str) -> None:
    """Replace the two tables in a Markdown document, each from a line that begins with `| format | matrices`.

    `make servers` calls it.
    """
    path = Path(file)
    lines, written = path.read_text(encoding="utf-8").splitlines(), 0
    for table in (markdown_table(), markdown_table(EXPERTS)):
        first = next(n for n in range(written, len(lines)) if lines[n].startswith("| format | matrices"))
        last = next((n for n in range(first, len(lines)) if not lines[n].startswith("|")), len(lines))
        lines[first:last] = table.splitlines()
        written = first + len(table.splitlines())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(row: SchemeSupport) -> str:
    """Return a cell of the table in Markdown."""
    limits = [] if row.groups is None else [f"groups {', '.join(str(size) for size in row.groups if size)}"]
    if row.multiple != 1:
        limits.append(f"sizes by {row.multiple}{' on a CPU' if row.status is Status.SERVED else ''}")
    if row.status in (Status.SERVED, Status.GPU_ONLY) and row.zero_points is not Status.UNKNOWN:
        is_taken = row.zero_points in (Status.SERVED, Status.GPU_ONLY)
        limits.append("zero points too" if is_taken else f"zero points {row.zero_points.value}")
    text = f"{row.status.value} ({row.evidence.value})"
    return f"**{text}**" if row.status is Status.WRONG else "; ".join([text, *limits])


_SAYS = {Status.REFUSED: "is refused by", Status.WRONG: "is read wrongly by"}


def _of_scheme(runtime: Runtime, section: ServedCheckpoint, scheme: WeightScheme | EngineScheme) -> Treatment:
    return _of_row(runtime, describe_kind(scheme), section, scheme, SCHEMES)


def _of_experts(
    runtime: Runtime, section: ServedCheckpoint, matrices: Iterable[Matrix]
) -> Iterator[Treatment]:
    """Yield what a runtime does with each scheme of the experts among the matrices."""
    schemes = {describe_kind(matrix.scheme): matrix.scheme for matrix in matrices if matrix.is_expert}
    for text, scheme in schemes.items():
        yield _of_row(runtime, f"experts in {text}", section, scheme, EXPERTS)


def _of_row(
    runtime: Runtime,
    subject: str,
    section: ServedCheckpoint,
    scheme: WeightScheme | EngineScheme,
    table: Mapping[tuple[Runtime, CheckpointFormat], Mapping[MatrixKind, SchemeSupport]],
) -> Treatment:
    row = table.get((runtime, section.format), {}).get(kind_of(scheme))
    if row is None:
        return Treatment(
            runtime, subject, Status.UNKNOWN, f"it was not tried with format {section.format.value}"
        )
    where = f"{row.evidence.value}: {row.where}"
    if row.status in (Status.REFUSED, Status.WRONG, Status.UNKNOWN):
        return Treatment(runtime, subject, row.status, row.reason, where)
    if row.groups is not None and (scheme.block_size or 0) not in row.groups:
        sizes = " or ".join(str(size) if size else "all inputs of an output" for size in row.groups)
        return Treatment(runtime, subject, Status.REFUSED, f"it takes groups of {sizes}", where)
    if not scheme.symmetric and row.zero_points is not row.status:
        return Treatment(runtime, subject, row.zero_points, row.zero_points_reason, where)
    return Treatment(runtime, subject, row.status, row.reason, where)


def _of_folder(runtime: Runtime, section: ServedCheckpoint, schemes: int) -> Iterator[Treatment]:
    row = FOLDERS.get((runtime, section.format), FolderSupport(Status.UNKNOWN))
    where = VERSIONS[runtime]
    if schemes > 1:
        yield Treatment(runtime, "several schemes in one folder", row.mixed, row.mixed_reason, where)


def _of_cache(runtime: Runtime, target: Target, section: ServedCheckpoint) -> Iterator[Treatment]:
    """Yield what a runtime does with the scales of a KV cache in fp8, if the target has them."""
    if target.kv_cache is not CacheType.FP8:
        return
    subject, row = "scales of a KV cache in fp8", CACHES.get((runtime, section.format))
    if row is None:
        yield Treatment(runtime, subject, Status.UNKNOWN, "they were not tried")
    else:
        yield Treatment(runtime, subject, row.status, row.reason, f"{row.evidence.value}: {row.where}")


def _of_shapes(
    runtime: Runtime, section: ServedCheckpoint, matrices: Iterable[Matrix]
) -> Iterator[Treatment]:
    """Yield a treatment of the matrices whose sizes the kernels do not take."""
    names: dict[tuple[Status, str, str], list[str]] = {}
    for matrix in matrices:
        row = SCHEMES.get((runtime, section.format), {}).get(kind_of(matrix.scheme))
        if row is not None and any(size % row.multiple for size in matrix.shape):
            outputs, inputs = matrix.shape
            reason = f"{outputs} outputs and {inputs} inputs must be multiples of {row.multiple}"
            status = Status.GPU_ONLY if row.status is Status.SERVED else Status.REFUSED
            key = (status, reason, f"{row.evidence.value}: {row.where}")
            names.setdefault(key, []).append(matrix.name)
    for (status, reason, where), each in names.items():
        yield Treatment(runtime, count_names(each), status, reason, where)
