"""Trace code that splits rows into parts whose sizes a step computes, such as one part for each expert.

Mixtures of experts sort their rows by expert, count them, split them by these counts, let each expert compute
its part, and concatenate the results. A trace cannot know the counts. Every expert gets all rows instead, and
where the results are concatenated, each row keeps the result of the part that it is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmc.errors import UnsupportedError
from llmc.trace.capture import active_capture

if TYPE_CHECKING:
    import torch

_SPLITS = frozenset({"split", "split_with_sizes"})
_JOINS = frozenset({"cat", "concat", "concatenate"})
_REASON = "their code splits the rows of a step by expert"


@contextmanager
def splitting_by_computed_sizes() -> Iterator[None]:
    """Let code within this context split rows by sizes that it computes.

    Raises:
        UnsupportedError: The context ends before such parts are concatenated.
    """
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[tuple[torch.Tensor, list[Any]]] = []

        def __torch_function__(
            self, function: Any, _: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            name, given = getattr(function, "__name__", ""), kwargs or {}
            axis = given.get("dim", args[-1] if args and isinstance(args[-1], int) else 0)
            if name in _SPLITS and len(args) > 1 and axis == 0 and _are_computed(args[1]):
                self.open.append((args[0], list(args[1])))
                active_capture().dense_experts[_REASON] = None
                return (args[0],) * len(args[1])
            if name in _JOINS and self.open and args and axis == 0:
                rows, sizes = self.open[-1]
                if len(args[0]) == len(sizes) and all(_as_many(part, rows) for part in args[0]):
                    self.open.pop()
                    return _select(list(args[0]), sizes)
            return function(*args, **given)

    with Mode() as mode:
        yield
    if mode.open:
        raise UnsupportedError(
            "the model splits rows by sizes that it computes, and does not concatenate the parts",
            hint="experts can be compiled if transformers' experts interface calls them",
        )


def _are_computed(sizes: Any) -> bool:
    """Return whether `sizes` are numbers that depend on the values of a step."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(sizes, (list, tuple)) and any(free_unbacked_symbols(size) for size in sizes)


def _as_many(part: torch.Tensor, rows: torch.Tensor) -> bool:
    """Return whether `part` has a row for each of `rows`."""
    return str(part.shape[0]) == str(rows.shape[0])


def _select(results: list[torch.Tensor], sizes: list[Any]) -> torch.Tensor:
    """Return for each row the result of the part that it is in.

    Args:
        results: The result of each part for all rows, (rows, ...).
        sizes: Rows of each part.
    """
    import torch

    total = results[0]
    row = torch.ones_like(total[:, :1], dtype=torch.long).cumsum(0) - 1
    start = 0
    for result, size in zip(results[1:], sizes[:-1], strict=True):
        start = start + size
        total = torch.where(row >= start, result, total)
    return total
