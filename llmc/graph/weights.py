"""Read weights only when they are written: lazy rows, groups of outputs, initializers.

Nothing here holds a tensor: a `Rows` returns slices along its first axis, a `WeightGroup` computes one or
several initializers (codes, scales, zero points) from them, and a `LazyWeight` represents the initializer in
the graph until a backend writes it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array


class CodeRows(NamedTuple):
    """Codes of some outputs of a matrix.

    Args:
        codes: Codes, uint8 (n, K).
        zero_points: Zero points, uint8 (n, groups); their values do not matter if there are minimums.
        scales: Scales, (n, groups), in the type that the checkpoint stores.
        minimums: Minimums, (n, groups), in the type of the scales; None unless the grid has them.
    """

    codes: Array
    zero_points: Array
    scales: Array
    minimums: Array | None = None


@dataclass(frozen=True)
class CodeGrid:
    """The codes that a checkpoint stores for a matrix (N, K).

    A weight is (code - zero point) * scale, or code * scale + minimum.

    Args:
        bits: Codes and zero points are in 0..2**bits - 1.
        group_size: Adjacent inputs that share a scale and a zero point; K if all inputs of an output do.
        symmetric: Whether every zero point is 2**(bits - 1).
        scale_dtype: Type of the scales.
        read: Reads outputs start:stop.
        minimums: Whether a group has a minimum instead of a zero point.
        compact: Whether the checkpoint stores its scales in fewer bits than `scale_dtype`, as products of
            small numbers; they are stored as float16, since all their digits would take more space than in
            the checkpoint.
        turned: Whether the tensor has its inputs first, (…, K, N), although its codes are by output.
        even: Whether all codes occur; not those of small floats that are read as integers.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: np.dtype
    read: Callable[[int, int], CodeRows]
    minimums: bool = False
    compact: bool = False
    turned: bool = False
    even: bool = True


@dataclass(frozen=True, kw_only=True)
class StackGrid(CodeGrid):
    """The codes of stacked matrices as one matrix, (experts * N, K): one expert after the other.

    Args:
        outputs: N, the outputs of one expert.
    """

    outputs: int


@dataclass(frozen=True)
class TensorInfo:
    """The name, shape and element type of a stored tensor, without its data.

    Args:
        codes: Returns the codes of a tensor that the checkpoint has quantized, or the reason why they do not
            form a grid of blocks; None for a tensor that is not quantized. Reads zero points and group
            indices.
    """

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    codes: Callable[[], CodeGrid | str] | None = None


class WeightStore(Protocol):
    """The tensors of a checkpoint by the parameter names of the transformers model."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return a description of every tensor, by name; reads no data."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Read rows start:stop along axis 0 of tensor `name`, (stop - start, ...), in the stored type.

        bfloat16 is returned as `ml_dtypes.bfloat16`. A scalar (0-d) tensor is returned whole.
        """
        ...


class Rows(Protocol):
    """A tensor of known shape and type that can be read a range of rows at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> ir.DataType: ...

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the checkpoint tensors from which the rows are made."""
        ...

    def rows(self, start: int, stop: int) -> Array:
        """Read rows start:stop along axis 0, in `dtype`."""
        ...


@dataclass(frozen=True)
class StoredRows:
    """A tensor as the checkpoint stores it."""

    store: WeightStore
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> ir.DataType:
        return self.info.dtype

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.info.name,)

    def rows(self, start: int, stop: int) -> Array:
        return self.store.read(self.info.name, start, stop)


@dataclass(frozen=True)
class CastRows:
    """The rows of a tensor, converted to another element type."""

    inner: Rows
    dtype: ir.DataType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def sources(self) -> tuple[str, ...]:
        return self.inner.sources

    def rows(self, start: int, stop: int) -> Array:
        return self.inner.rows(start, stop).astype(self.dtype.numpy(), copy=False)


@dataclass(frozen=True)
class ConcatRows:
    """The concatenation of tensors of equal trailing shape and type along axis 0."""

    parts: tuple[Rows, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> ir.DataType:
        return self.parts[0].dtype

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(s for p in self.parts for s in p.sources)

    def rows(self, start: int, stop: int) -> Array:
        pieces = []
        offset = 0
        for part in self.parts:
            low, high = max(start - offset, 0), min(stop - offset, part.shape[0])
            if low < high:
                pieces.append(part.rows(low, high))
            offset += part.shape[0]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class TransposedRows:
    """The transpose of a matrix; reads the whole matrix for any range of rows."""

    inner: Rows

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape[::-1]

    @property
    def dtype(self) -> ir.DataType:
        return self.inner.dtype

    @property
    def sources(self) -> tuple[str, ...]:
        return self.inner.sources

    def rows(self, start: int, stop: int) -> Array:
        return read_all(self.inner).T[start:stop]


@dataclass(frozen=True)
class ExpertRows:
    """The matrices or biases of stacked experts, one expert per row: (experts, outputs, …).

    Args:
        inner: Rows of shape (experts, outputs, inputs), (experts, inputs, outputs) or (experts, outputs).
        transposed: Whether to swap outputs and inputs.
        interleave: Whether to interleave the two halves of the outputs: 0, n / 2, 1, n / 2 + 1, …
        doubled: Whether all outputs are repeated behind themselves, before they are interleaved.
    """

    inner: Rows
    transposed: bool
    interleave: bool
    doubled: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        experts, *rest = self.inner.shape
        outputs, *inputs = reversed(rest) if self.transposed else rest
        return (experts, 2 * outputs if self.doubled else outputs, *inputs)

    @property
    def dtype(self) -> ir.DataType:
        return self.inner.dtype

    @property
    def sources(self) -> tuple[str, ...]:
        return self.inner.sources

    def rows(self, start: int, stop: int) -> Array:
        array = self.inner.rows(start, stop)
        if self.transposed:
            array = array.swapaxes(1, 2)
        if self.doubled:
            array = np.concatenate([array, array], axis=1)
        if self.interleave:
            halves = array.reshape(len(array), 2, -1, *array.shape[2:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        return array

    def undo(self, array: Array) -> Array:
        """Return the rows of `inner` for which reading gives `array`."""
        if self.interleave:
            pairs = array.reshape(len(array), -1, 2, *array.shape[2:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        if self.doubled:
            array = array[:, : array.shape[1] // 2]
        return array.swapaxes(1, 2) if self.transposed else array


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """The rows times a factor for each index of one axis.

    Args:
        factors: Factors, float32, one per index of the axis.
        axis: Axis of the factors: 0, or 1 of a matrix.
    """

    inner: Rows
    factors: Array
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> ir.DataType:
        return self.inner.dtype

    @property
    def sources(self) -> tuple[str, ...]:
        return self.inner.sources

    def rows(self, start: int, stop: int) -> Array:
        array = self.inner.rows(start, stop)
        own = self.factors[start:stop] if self.axis == 0 else self.factors
        scaled: Array = self._times(array, own).astype(array.dtype)
        return scaled

    def undo(self, array: Array) -> Array:
        """Return the rows of `inner` for which reading gives all of `array`, float32."""
        return self._times(array, 1 / self.factors)

    def _times(self, array: Array, factors: Array) -> Array:
        if self.axis == 0:
            factors = factors.reshape(-1, *(1,) * (array.ndim - 1))
        product: Array = array.astype(np.float32) * factors
        return product


@dataclass(frozen=True)
class ShiftedRows:
    """The rows plus a constant, added in float32."""

    inner: Rows
    shift: float
    dtype: ir.DataType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def sources(self) -> tuple[str, ...]:
        return self.inner.sources

    def rows(self, start: int, stop: int) -> Array:
        total = self.inner.rows(start, stop).astype(np.float32) + np.float32(self.shift)
        return total.astype(self.dtype.numpy(), copy=False)


def read_all(rows: Rows) -> Array:
    """Read all rows at once, shape `rows.shape`."""
    return rows.rows(0, rows.shape[0] if rows.shape else 1)


def code_form(rows: Rows) -> tuple[int, int, bool] | None:
    """Return bits of the operators' codes, inputs per group and presence of minimums, for codes to be kept.

    Return None for a matrix that is stored as floats, or whose codes do not form a grid of blocks.
    """
    match rows:
        case CastRows():
            return code_form(rows.inner)
        case ConcatRows():
            forms = {code_form(part) for part in rows.parts}
            return forms.pop() if len(forms) == 1 else None
        case StoredRows():
            grid = None if rows.info.codes is None else rows.info.codes()
            if isinstance(grid, CodeGrid):
                return 4 if grid.bits <= 4 else 8, grid.group_size, grid.minimums
    return None


def row_chunks(rows: Rows, chunk_bytes: int = 16 << 20) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that take about `chunk_bytes` each as float32."""
    if not rows.shape:  # a scalar is read whole
        yield 0, 1
        return
    per_row = max(1, 4 * int(np.prod(rows.shape[1:], dtype=np.int64)))
    step = max(1, chunk_bytes // per_row)
    for start in range(0, rows.shape[0], step):
        yield start, min(start + step, rows.shape[0])


@dataclass(frozen=True)
class WeightGroup:
    """The initializers that one computation gives, such as codes, scales and zero points.

    Args:
        sources: Checkpoint tensors read by `compute`.
        compute: Returns every member by its key; called once when the group is written.
    """

    sources: tuple[str, ...]
    compute: Callable[[], Mapping[str, Array]]


class LazyWeight(ir.LazyTensor):
    """An initializer whose data is computed on access and not kept.

    `rows` is set if the initializer is a plain (possibly joined, cast or transposed) tensor of the
    checkpoint, so that a pass can take it apart or quantize it; otherwise it is None and the value is the
    `key` member of `group`.
    """

    def __init__(
        self,
        *,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        group: WeightGroup,
        key: str,
        rows: Rows | None = None,
    ) -> None:
        self.group = group
        self.key = key
        self.rows = rows
        super().__init__(self._load, dtype=dtype, shape=ir.Shape(shape), name=name)

    @classmethod
    def from_rows(cls, name: str, rows: Rows) -> "LazyWeight":
        """Create an initializer with the values of `rows`."""
        group = WeightGroup(rows.sources, lambda: {"value": read_all(rows)})
        return cls(name=name, dtype=rows.dtype, shape=rows.shape, group=group, key="value", rows=rows)

    @property
    def sources(self) -> tuple[str, ...]:
        return self.group.sources

    def _load(self) -> ir.TensorProtocol:
        return ir.tensor(
            np.ascontiguousarray(self.group.compute()[self.key]), dtype=self.dtype, name=self.name
        )
