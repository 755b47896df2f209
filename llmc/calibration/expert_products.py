"""Observe and change the inputs of the products of stacked experts while a model's own code runs.

transformers keeps the matrices of a layer's experts in one parameter, (experts, N, K) or (experts, K, N), and
multiplies rows by slices of it: one slice at a time, all of them at once, or by groups of rows
(`grouped_mm`). A product is recognized by the storage that its weight is a view of, so that no name of a
class or of a parameter matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Returns new inputs (n, K) of one expert's matrix, or None to leave them: called with the name of the
#: stacked parameter, the index of the expert, and its inputs.
Visitor = Callable[[str, int, "torch.Tensor"], "torch.Tensor | None"]
#: Names of the functions whose second operand is a matrix, or a stack of them.
_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "mm", "bmm"})
_GROUPED = frozenset({"grouped_mm", "_grouped_mm"})


def stacked_parameters(name: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters with three axes of `module`, called `name` in the model, by their full names."""
    prefix = f"{name}." if name else ""
    return {f"{prefix}{own}": p for own, p in module.named_parameters() if p.ndim == 3}


def visiting_experts(stacks: Mapping[str, torch.Tensor], visit: Visitor) -> AbstractContextManager[Any]:
    """Give a visitor the inputs of every product with an expert's matrix, within the context.

    Args:
        stacks: The stacked parameters by name, with their values.
        visit: The visitor; experts without inputs are not visited.
    """
    from torch.overrides import TorchFunctionMode

    products = _Products(stacks, visit)

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            return products.call(func, args, kwargs or {})

    return Mode()


class _Products:
    """The products with the matrices of some stacks."""

    def __init__(self, stacks: Mapping[str, torch.Tensor], visit: Visitor) -> None:
        self._stacks = {each.untyped_storage().data_ptr(): (name, each) for name, each in stacks.items()}
        self._visit = visit

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of torch, with changed inputs if it is a product with experts."""
        name = getattr(func, "__name__", "")
        if name not in _PRODUCTS and name not in _GROUPED:
            return func(*args, **kwargs)
        found = self._find(args)
        if found is None:
            return func(*args, **kwargs)
        stack, rows, weight = found
        if name in _GROUPED:
            rows = self._by_groups(stack, rows, kwargs["offs"] if "offs" in kwargs else args[2])
        elif weight.ndim == 3:
            rows = self._of_all(stack, rows)
        else:
            one = weight.shape[0] * weight.shape[1]
            rows = self._of_one(stack, weight.storage_offset() // one, rows)
        return func(rows, *args[1:], **kwargs)

    def _find(self, args: tuple[Any, ...]) -> tuple[str, Any, Any] | None:
        """Return the name of the stack, the rows and the weight of a product with one of the stacks."""
        import torch

        if len(args) < 2 or not isinstance(args[1], torch.Tensor) or args[1].device.type == "meta":
            return None
        found = self._stacks.get(args[1].untyped_storage().data_ptr())
        if found is None or not isinstance(args[0], torch.Tensor):
            return None
        name, stack = found
        shape, one = tuple(args[1].shape), tuple(stack.shape[1:])
        whole = len(shape) == 2 or shape[0] == stack.shape[0]
        if not whole or shape[-2:] not in (one, one[::-1]):
            return None
        return name, args[0], args[1]

    def _of_one(self, stack: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        if not len(flat):
            return rows
        changed = self._visit(stack, expert, flat)
        return rows if changed is None else changed.reshape(rows.shape)

    def _of_all(self, stack: str, rows: torch.Tensor) -> torch.Tensor:
        """Visit every expert with its own rows (experts, n, K), or with the same rows (n, K) or (1, n, K).

        A row of zeros is a token that was not sent to the expert.
        """
        import torch

        count = self._count(stack)
        each = rows.expand(count, *rows.shape[-2:])
        changed = []
        for expert in range(count):
            used = each[expert].abs().amax(-1) > 0
            part = self._visit(stack, expert, each[expert][used]) if bool(used.any()) else None
            if part is not None:
                whole = each[expert].clone()
                whole[used] = part
                part = whole
            changed.append(each[expert] if part is None else part)
        return torch.stack(changed)

    def _by_groups(self, stack: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Visit every expert with its range of rows (n, K), of which `ends` has the ends."""
        start, changed = 0, None
        for expert, end in enumerate(ends.tolist()):
            part = self._visit(stack, expert, rows[start:end]) if end > start else None
            if part is not None:
                changed = rows.clone() if changed is None else changed
                changed[start:end] = part
            start = end
        return rows if changed is None else changed

    def _count(self, stack: str) -> int:
        return next(len(each) for name, each in self._stacks.values() if name == stack)
