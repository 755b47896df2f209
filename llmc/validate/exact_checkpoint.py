"""Compare the tensors of a checkpoint artifact bit for bit with those that a build writes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement
from llmc.config import Metric
from llmc.errors import CheckpointError, ParityError
from llmc.graph.weights import StoredRows, WeightStore, row_chunks
from llmc.validate.exact import describe_count, differing, first_place, listed
from llmc.validate.measure import measured
from llmc.validate.reference import Advance, quietly

_WHERE = "numpy, from the files"


class Written(Protocol):
    """Tensors that one computation of a build gives; see `llmc.backends.written`."""

    @property
    def specs(self) -> Mapping[str, tuple[ir.DataType, tuple[int, ...]]]:
        """The element type and shape of each tensor, by its name in the files."""
        ...

    @property
    def weight(self) -> str | None:
        """The parameter of the checkpoint whose codes they hold; None for tensors that are not codes."""
        ...

    @property
    def rows(self) -> Callable[[], Iterator[Array]] | None:
        """What yields the rows of the only tensor, a few MiB at a time; None to compute all at once."""
        ...

    @property
    def compute(self) -> Callable[[], Mapping[str, Array]]:
        """What returns every tensor by its name."""
        ...


def measure_files(
    stored: WeightStore,
    expected: Iterable[Written],
    is_unknown: Callable[[str, str | None], bool],
    beside: Sequence[str] = (),
    advance: Advance = quietly,
) -> Measurement:
    """Measure WEIGHTS_EXACT: the number of tensors of the files that differ from those of a build.

    Args:
        stored: The tensors of the artifact's files, under their own names.
        expected: The tensors that a build writes.
        is_unknown: Returns whether a tensor cannot be computed here, by its name and the parameter whose
            codes it belongs to; its type and shape alone are compared.
        beside: Errors of other kinds, a sentence each.
        advance: Called with the number of computations done and their total.

    Raises:
        ParityError: The files cannot be read.
    """
    groups, infos = list(expected), stored.infos()
    differences, compared, by_value = [*beside], 0, 0
    known: set[str] = set()
    for done, group in enumerate(groups, 1):
        unknown = {name for name in group.specs if is_unknown(name, group.weight)}
        known.update(group.specs)
        by_value += len(unknown)
        for name, difference in _compare(group, unknown, stored):
            compared += 1
            if difference is not None:
                differences.append(f"{name} {difference}")
        advance(done, len(groups))
    differences += [f"{name} is not written by a build" for name in infos if name not in known]
    detail = f"{compared} tensors of the files equal those of a build, bit for bit"
    if differences:
        detail = f"{len(differences)} of {compared} differ: {listed(differences)}"
    if by_value:
        detail += f"; compared by type and shape, as their calibration is not known here: {by_value}"
    return measured(Metric.WEIGHTS_EXACT, float(len(differences)), detail, _WHERE)


def _compare(group: Written, unknown: set[str], stored: WeightStore) -> Iterator[tuple[str, str | None]]:
    """Yield each tensor's name, and how the file's differs from the build's; None if it does not."""
    infos = stored.infos()
    computed: Mapping[str, Array] = {}
    for name, (dtype, shape) in group.specs.items():
        info = infos.get(name)
        if info is None:
            yield name, "is missing"
        elif (info.dtype, info.shape) != (dtype, shape):
            yield name, f"is {info.dtype.name} {list(info.shape)}, not {dtype.name} {list(shape)}"
        elif name in unknown:
            yield name, None
        elif group.rows is not None:
            yield name, _difference(StoredRows(stored, info), group.rows())
        else:
            computed = computed or group.compute()
            yield name, _difference(StoredRows(stored, info), iter([computed[name]]))


def _difference(rows: StoredRows, parts: Iterator[Array]) -> str | None:
    """Describe how a tensor of the files differs from the one of which a build gives `parts` of its rows."""
    count, first, at = 0, "", 0
    for part in parts:
        expected = np.atleast_1d(part)
        for start, stop in row_chunks(rows):
            if start >= len(expected):
                break
            end = min(stop, len(expected))
            try:
                actual = np.atleast_1d(rows.rows(at + start, at + end))
            except CheckpointError as error:
                raise ParityError(error.fact) from error
            differs = differing(expected[start:end], actual)
            if differs.any():
                first = first or first_place(differs, at + start)
                count += int(differs.sum())
        at += len(expected)
    size = int(np.prod(rows.shape, dtype=np.int64))
    return describe_count(count, size, first) if count else None
