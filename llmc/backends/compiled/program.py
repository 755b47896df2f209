"""A region's program: operations over places in a workspace, and its C++ text (llmc/kernels/program.h)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

LANES = 16
#: Tokens of a sequence in one step up to which kernels give each the bits that it has alone.
SAME_TOKENS = 8
#: Dimensions of outputs that a step decides, in C++, by their names in the graph.
SYMBOLS = {"batch": "~0", "sequence": "~1", "total": "~2"}
#: The dimension of the tokens of a sequence that are chosen, in C++.
CHOSEN = "~3"

Space = Literal["kTokens", "kLast"]

#: How a region is computed: as it is served; with products in float32; with the KV cache and attention too.
Variant = Literal["served", "products", "exact"]


@dataclass(eq=False)
class Buffer:
    """Columns of the workspace, `width` floats for every row; `column` is set when all are laid out."""

    width: int
    column: int = -1


@dataclass(eq=False)
class Tensor:
    """A tensor of the operator; `index` counts inputs, then outputs, and is set when all are known."""

    index: int = -1


@dataclass(frozen=True)
class RowPlace:
    """Rows of float32: where they are, how far apart, and which part of them is meant.

    Args:
        stride: Floats from row to row.
        offset: Floats before the part.
        width: Floats of the part.
        space: One row a token, or one a sequence.
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
    """Past key and value, present key and value."""

    tensors: tuple[Tensor, ...]


Operand = RowPlace | Tensor | Caches | int | float | str
Fields = dict[str, Operand]


@dataclass
class Operation:
    """One entry of the program.

    Args:
        kind: Done row by row, or in chunks of its own making.
        fields: Members of `llmc::Op` by name, functions as C++ text.
        scratch, shared: C++ expressions for the memory it needs of each thread, and of all together.
        instead: What replaces it in programs of other variants, by variant; the others have it too.
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


#: Members in their order of the structs of llmc/kernels/program.h that a generated program initializes.
MEMBERS: Mapping[str, tuple[str, ...]] = {
    "Ref": ("base", "stride", "offset"),
    "Op": (
        *("check", "row", "chunks", "chunk", "ahead", "space", "out", "a", "b", "c", "weight", "bias"),
        *("n", "k", "x", "y", "cache", "lengths", "cos", "sin", "window", "shift", "limit"),
    ),
    "Output": ("type", "rank", "dims", "past"),
    "Extent": ("over", "bytes"),
    "Region": (
        *("name", "input_types", "extents", "inputs", "outputs", "output_count", "ops", "op_count"),
        *("computed", "rows_from", "total", "chosen", "choice", "width", "scratch", "shared"),
    ),
    "Domain": ("name", "regions"),
}


@dataclass
class Program:
    """Operations in order, with the element-wise functions that they call.

    Args:
        functions: Bodies of generated row functions by name.
    """

    operations: list[Operation] = field(default_factory=list)
    functions: dict[str, str] = field(default_factory=dict)

    def variant(self, variant: Variant) -> "Program":
        """The same program as another variant has it.

        All share their buffers: `lay_out` the one whose text is made next.
        """
        made = [
            replacement
            for operation in self.operations
            for replacement in operation.instead.get(variant, (operation,))
        ]
        return Program(made, self.functions)

    def lay_out(self) -> int:
        """Give every buffer its columns; returns the width of the workspace.

        Rows that follow each other run in one phase, in which threads are at different rows. So two buffers
        share memory only if no phase uses both, or lies between the uses of one and uses the other. The
        widest are placed first (Pisarchyk and Lee 2020, greedy by size).
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
            taken = sorted(
                (other.column, other.column + -(-other.width // LANES) * LANES)
                for other in placed
                if last[other] >= first[buffer] and first[other] <= last[buffer]
            )
            column = 0
            for start, stop in taken:
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


def _operand(value: Operand) -> str:
    match value:
        case RowPlace():
            return value.text()
        case Tensor():
            return str(value.index)
        case Caches():
            return "{" + ", ".join(str(tensor.index) for tensor in value.tensors) + "}"
        case float():
            return f"{value!r}f" if "." in repr(value) or "e" in repr(value) else f"{value!r}.0f"
        case _:
            return str(value)
