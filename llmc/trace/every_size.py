"""Export a step for every size, though torch cannot prove that its code is the same for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Sizes for which conditions are checked: rows, new tokens, and tokens in the cache.
_ROWS, _NEW, _PAST = (1, 2, 5), (1, 2, 3, 16, 129), (0, 1, 2, 64, 1000)


def export_all_sizes(
    step: torch.nn.Module, example: tuple[torch.Tensor, ...], shapes: tuple[dict[int, Any], ...]
) -> torch.export.ExportedProgram:
    """Export `step` with dynamic sizes.

    torch refuses conditions on sizes that it cannot prove, such as n * min(64, 64 n) = 64 n. They are then
    left in the program, and checked for sizes of every kind.

    Args:
        step: Module of token ids (batch, sequence), a mask (batch, total) and positions.
        example: Its arguments.
        shapes: Their dynamic dimensions.

    Raises:
        torch._dynamo.exc.UserError: The code differs between sizes.
    """
    import torch
    from torch._dynamo.exc import UserError

    try:
        return torch.export.export(step, example, dynamic_shapes=shapes, strict=False)
    except UserError as error:
        try:
            program = torch.export.export(
                step,
                example,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except UserError:
            raise error from None
        if not _holds(program):
            raise
        return program


def _holds(program: torch.export.ExportedProgram) -> bool:
    """Return whether every condition on sizes in `program` is true for all sizes that are checked."""
    import torch

    named = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    (batch, sequence), (_, total) = named["input_ids"].shape, named["attention_mask"].shape
    symbols = [size.node.expr for size in (batch, sequence, total)]
    conditions = [
        value.node.expr
        for node in program.graph.nodes
        if node.target is torch.ops.aten._assert_scalar.default
        and isinstance(value := getattr(node.args[0], "meta", {}).get("val"), torch.SymBool)
    ]
    return all(
        bool(condition.subs(dict(zip(symbols, sizes, strict=True))))
        for condition in conditions
        for sizes in _sizes()
    )


def _sizes() -> Iterator[tuple[int, int, int]]:
    """Yield batch, sequence and total."""
    for rows, new, past in product(_ROWS, _NEW, _PAST):
        yield rows, new, new + past
