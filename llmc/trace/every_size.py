"""Export a step for every size, though torch cannot prove that its code is the same for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Sizes for which conditions are checked: rows, new tokens, and tokens in the cache.
_ROWS, _NEW, _PAST = (1, 2, 5), (1, 2, 3, 16, 129), (0, 1, 2, 64, 1000)
#: Numbers of chosen tokens and the like for which conditions are checked.
_COUNTS = (0, 1, 2, 5)


def export_all_sizes(
    step: torch.nn.Module, example: tuple[torch.Tensor, ...], shapes: tuple[dict[int, Any], ...]
) -> torch.export.ExportedProgram:
    """Export `step` with dynamic sizes.

    torch refuses conditions on sizes that it cannot prove, such as n * min(64, 64 n) = 64 n. They are then
    left in the program, and checked for sizes of every kind. It also takes a size that is 1 in the example
    to be 1 always, such as the number of blocks of 16 tokens; at last, no size is distinguished from others.

    Args:
        step: Module of token ids (batch, sequence), a mask (batch, total) and positions.
        example: Its arguments.
        shapes: Their dynamic dimensions.

    Raises:
        torch._dynamo.exc.UserError: The code differs between sizes.
    """
    import torch
    from torch._dynamo.exc import UserError
    from torch.fx.experimental import _config

    settings: Any = _config

    def export(*, deferred: bool, alike: bool) -> torch.export.ExportedProgram:
        with settings.patch(backed_size_oblivious=alike):
            return torch.export.export(
                step,
                example,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=deferred,
            )

    try:
        return export(deferred=False, alike=False)
    except UserError as error:
        for alike in (False, True):
            try:
                program = export(deferred=True, alike=alike)
            except UserError:
                continue
            if _holds(program, alike=alike):
                return program
        raise error from None


def _holds(program: torch.export.ExportedProgram, *, alike: bool) -> bool:
    """Return whether every condition on sizes in `program` is true for all sizes that are checked.

    If all sizes are `alike`, torch notes of each that it differs from 1 and from others. It assumes as much
    without a note if they are not. Numbers that depend on values, such as how many tokens are chosen, are
    checked for small ones.
    """
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
    if alike:
        conditions = [condition for condition in conditions if getattr(condition, "rel_op", "") != "!="]
    return all(
        bool(known.subs(dict.fromkeys(known.free_symbols, count)))
        for condition in conditions
        for sizes in _sizes()
        for known in [condition.subs(dict(zip(symbols, sizes, strict=True)))]
        for count in (_COUNTS if known.free_symbols else _COUNTS[:1])
    )


def _sizes() -> Iterator[tuple[int, int, int]]:
    """Yield batch, sequence and total."""
    for rows, new, past in product(_ROWS, _NEW, _PAST):
        yield rows, new, new + past
