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
    for module, name in own:
        setattr(module, name, bounds[name])
    try:
        yield
    finally:
        for module, name in own:
            delattr(module, name)


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
