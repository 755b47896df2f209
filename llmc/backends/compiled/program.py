"""Represent a region's program: operations on places in a workspace, and its C++ text (program.h)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

LANES = 16
#: Largest number of tokens of a sequence in one step for which kernels give each the same bits as alone.
SAME_TOKENS = 8
#: Largest number of dimensions of a tensor that a region reads or writes.
MOST_DIMS = 6
#: Dimensions of outputs that a step determines, in C++, by their names in the graph.
SYMBOLS = {"batch": "~0", "sequence": "~1", "total": "~2"}
#: The dimension of the chosen tokens of a sequence, in C++.
CHOSEN = "~3"
#: The dimension of n parts of every token is ~(PER_TOKEN + n), in C++.
PER_TOKEN = 3

Space = Literal["kTokens", "kLast"]

#: How a region is computed: as served; with products in float32; or also with float32 cache and attention.
Variant = Literal["served", "products", "exact"]


@dataclass(eq=False)
class Buffer:
    """Columns of the workspace, `width` floats for every row; `lay_out` sets `column`."""

    width: int
    column: int = -1


@dataclass(eq=False)
class Tensor:
    """A tensor of the operator; `index` counts inputs, then outputs, and is set when all are known."""

    index: int = -1


@dataclass(frozen=True)
class RowPlace:
    """Rows of float32: their place, their distance, and the part of them that is meant.

    Args:
        stride: Floats from row to row.
        offset: Floats before the part.
        width: Floats of the part.
        space: Whether there is a row per token or per sequence.
    """

    home: Buffer | Tensor
    stride: int
    offset: int
    width: int
    space: Space

    def part(self, offset: int, width: int) -> "RowPlace":
        return replace(self, offset=self.offset + offset, width=width)

    def text(self) -> str:
        base = self.home.column if isinstance(self.home, Buffer) else ~self.home.index
        return f"{{{base}, {self.stride}, {self.offset}}}"


@dataclass(frozen=True)
class Caches:
    """The tensors of past key and value, present key and value."""

    tensors: tuple[Tensor, ...]


Operand = RowPlace | Tensor | Caches | int | float | str
Fields = dict[str, Operand]


@dataclass
class Operation:
    """An entry of the program.

    Args:
        kind: Whether it runs row by row, or in chunks that it defines.
        fields: Members of `llmc::Op` by name, functions as C++ text.
        scratch, shared: C++ expressions for the memory it needs per thread, and of all threads together.
        instead: Its replacements in programs of other variants, by variant; unlisted variants keep it.
    """

    kind: Literal["row", "chunk"]
    space: Space
    fields: Fields
    scratch: str | None = None
    shared: str | None = None
    instead: "Mapping[Variant, Sequence[Operation]]" = field(default_factory=dict)

    def buffers(self) -> list[Buffer]:
        places = [v for v in self.fields.values() if isinstance(v, RowPlace)]
        return [p.home for p in places if isinstance(p.home, Buffer)]


#: Members of the structs of llmc/kernels/program.h that a generated program initializes, in order.
MEMBERS: Mapping[str, tuple[str, ...]] = {
    "Ref": ("base", "stride", "offset"),
    "Op": (
        *("check", "row", "chunks", "chunk", "ahead", "space"),
        *("out", "a", "b", "c", "d", "e", "weight", "bias"),
        *("n", "k", "x", "y", "cache", "lengths", "cos", "sin", "window", "shift", "sinks", "limit"),
    ),
    "Output": ("type", "rank", "dims", "past"),
    "Extent": ("over", "bytes"),
    "Region": (
        *("name", "input_types", "extents", "inputs", "outputs", "output_count", "ops", "op_count"),
        *("computed", "rows_from", "sequence_at", "total", "chosen", "choice", "width", "scratch", "shared"),
    ),
    "Domain": ("name", "regions"),
}


@dataclass
class Program:
    """The operations in order, with the element-wise functions that they call.

    Args:
        functions: Bodies of generated row functions by name.
    """

    operations: list[Operation] = field(default_factory=list)
    functions: dict[str, str] = field(default_factory=dict)

    def variant(self, variant: Variant) -> "Program":
        """Return the program of another variant.

        All share their buffers: call `lay_out` on the one whose text is generated next.
        """
        operations = [
            replacement
            for operation in self.operations
            for replacement in operation.instead.get(variant, (operation,))
        ]
        return Program(operations, self.functions)

    def lay_out(self) -> int:
        """Assign every buffer its columns; return the width of the workspace.

        Consecutive row operations run in one phase, in which threads are at different rows. So two buffers
        share memory only if no phase uses both, or is between the uses of one and uses the other. The widest
        are placed first (Pisarchyk and Lee 2020, greedy by size).
        """
        phases = self._phases()
        first: dict[Buffer, int] = {}
        last: dict[Buffer, int] = {}
        for phase, operation in zip(phases, self.operations, strict=True):
            for buffer in operation.buffers():
                first.setdefault(buffer, phase)
                last[buffer] = phase
        placed: list[Buffer] = []
        for buffer in sorted(first, key=lambda b: -b.width):
            size = -(-buffer.width // LANES) * LANES
            occupied = sorted(
                (other.column, other.column + -(-other.width // LANES) * LANES)
                for other in placed
                if last[other] >= first[buffer] and first[other] <= last[buffer]
            )
            column = 0
            for start, stop in occupied:
                if start - column >= size:
                    break
                column = max(column, stop)
            buffer.column = column
            placed.append(buffer)
        return max((b.column + -(-b.width // LANES) * LANES for b in placed), default=0)

    def _phases(self) -> list[int]:
        phases: list[int] = []
        before: Operation | None = None
        for operation in self.operations:
            joined = (
                before is not None
                and operation.kind == before.kind == "row"
                and operation.space == before.space
            )
            phases.append(phases[-1] + (not joined) if phases else 0)
            before = operation
        return phases

    def text(self, operation: Operation) -> str:
        members: list[str] = []
        fields = {**operation.fields, "space": f"Space::{operation.space}"}
        fields.setdefault("bias", -1)
        for name in MEMBERS["Op"]:
            if name in fields:
                members.append(f".{name} = {_operand(fields[name])}")
        return "{" + ", ".join(members) + "}"


def float_literal(value: float) -> str:
    """Return the shortest C++ literal of a number in float32, however many digits it was read with."""
    text = str(np.float32(value))
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def _operand(value: Operand) -> str:
    match value:
        case RowPlace():
            return value.text()
        case Tensor():
            return str(value.index)
        case Caches():
            return "{" + ", ".join(str(tensor.index) for tensor in value.tensors) + "}"
        case float():
            return float_literal(value)
        case _:
            return str(value)
