"""Let Python's `min` and `max` of sizes be part of a trace, instead of a decision for one range of sizes."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def modules_of(model: torch.nn.Module) -> list[ModuleType]:
    """Return the Python modules that define the classes of `model`, bases included, by name."""
    names = {base.__module__ for m in model.modules() for base in type(m).__mro__}
    return [sys.modules[name] for name in sorted(names - {builtins.__name__})]


@contextmanager
def symbolic_bounds(model: torch.nn.Module) -> Iterator[None]:
    """Give the code of `model` functions `min` and `max` that stay symbolic for dynamic sizes.

    A model that takes the best k of all tokens, min(k, tokens), is otherwise traced for one side of k.
    """
    import torch

    changed = [m for m in modules_of(model) if m.__name__.startswith("transformers.models.")]
    bounds = {"min": _symbolic(min, torch.sym_min), "max": _symbolic(max, torch.sym_max)}
    own = [(module, name) for module in changed for name in bounds if name not in vars(module)]
    patches = [(torch, "topk", _top(torch.topk)), (torch.Tensor, "topk", _top(torch.Tensor.topk))]
    kept = [(place, name, getattr(place, name)) for place, name, _ in patches]
    for place, name, replacement in (*((m, n, bounds[n]) for m, n in own), *patches):
        setattr(place, name, replacement)
    try:
        yield
    finally:
        for module, name in own:
            delattr(module, name)
        for place, name, original in kept:
            setattr(place, name, original)


def _symbolic(plain: Callable[..., Any], symbolic: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    import torch

    def bound(*args: Any, **kwargs: Any) -> Any:
        sizes = len(args) > 1 and not kwargs and all(isinstance(a, (int, torch.SymInt)) for a in args)
        if not sizes or not any(isinstance(a, torch.SymInt) for a in args):
            return plain(*args, **kwargs)
        result = args[0]
        for other in args[1:]:
            result = symbolic(result, other)
        return result

    return bound


def _top(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return `topk` that takes a dynamic number of elements; torch cannot prove that there are as many."""
    import torch

    def topk(
        x: torch.Tensor, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True, **kwargs: Any
    ) -> Any:
        if not isinstance(k, torch.SymInt):
            return plain(x, k, dim, largest, sorted, **kwargs)
        axis = dim % x.ndim
        shape = [k if n == axis else size for n, size in enumerate(x.shape)]
        count: Any = k
        values, indices = torch.onnx.ops.symbolic_multi_out(
            "TopK",
            (x, torch.full((1,), count, dtype=torch.int64)),
            attrs={"axis": axis, "largest": int(largest), "sorted": int(sorted)},
            dtypes=(x.dtype, torch.int64),
            shapes=(shape, shape),
        )
        return torch.return_types.topk((values, indices))

    return topk
