"""Trace experts whose own code loops over those that the tokens of a step chose.

Such code asks which experts are chosen (`nonzero`) and by which tokens (`where`), which a trace cannot know.
It is run once per expert instead, as if every token had chosen that expert, with the weight that the router
gives it: 0 where the token did not choose it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmc.errors import UnsupportedError
from llmc.trace.capture import active_capture

if TYPE_CHECKING:
    import torch

_CHOICE, _WEIGHTS = "top_k_index", "top_k_weights"
_REASON = "their code loops over the experts"


def unroll_expert_loops(model: torch.nn.Module) -> None:
    """Let every module that transformers' experts interface does not call compute all of its experts."""
    for module in model.modules():
        if {_CHOICE, _WEIGHTS} <= set(inspect.signature(module.forward).parameters) and not hasattr(
            module, "has_gate"
        ):
            module.forward = _unrolled(module)


def _unrolled(module: torch.nn.Module) -> Callable[..., torch.Tensor]:
    forward: Callable[..., torch.Tensor] = module.forward
    signature = inspect.signature(forward)

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs).arguments
        choice, weights = given[_CHOICE], given[_WEIGHTS]
        total: torch.Tensor | None = None
        expert, count = 0, 1
        while expert < count:
            chosen = (choice == expert).to(weights.dtype)
            given[_CHOICE] = choice[:, :1] * 0 + expert
            given[_WEIGHTS] = (chosen * weights).sum(dim=1, keepdim=True)
            loop = _one_expert(expert, choice)
            with loop:
                output = forward(**given)
            if loop.classes is None or loop.asked != 1:
                raise UnsupportedError(f"{type(module).__name__} chooses its experts in an unknown way")
            total = output if total is None else total + output
            expert, count = expert + 1, int(getattr(module, "num_experts", loop.classes))
        active_capture().dense_experts[_REASON] = None
        if total is None:
            raise UnsupportedError(f"{type(module).__name__} has no experts")
        return total

    return run


def _one_expert(expert: int, choice: torch.Tensor) -> Any:
    """Return a context in which `expert` is the only one that is chosen, by every token.

    Its `classes` is the number of experts that the code counts, and `asked` how often it asked for tokens.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    first = torch.zeros_like(choice[:, 0])
    tokens = torch.ones_like(first).cumsum(0) - 1

    class Mode(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.classes: int | None = None
            self.asked = 0

        def __torch_function__(
            self, function: Any, _: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            name, given = getattr(function, "__name__", ""), kwargs or {}
            if name == "one_hot":
                self.classes = int(given.get("num_classes", args[1] if len(args) > 1 else -1))
            elif name == "nonzero":
                chosen = torch.tensor([[expert]])
                return (chosen[:, 0],) if given.get("as_tuple") else chosen
            elif name == "where" and len(args) == 1:
                self.asked += 1
                return first, tokens
            elif name == "__getitem__" and not isinstance(args[1], slice):
                places = args[1] if isinstance(args[1], tuple) else (args[1],)
                known = {id(first): 0, id(tokens): slice(None)}
                return function(args[0], tuple(known.get(id(place), place) for place in places))
            elif name == "index_add_" and args[2] is tokens:
                return args[0].add_(args[3])
            return function(*args, **given)

    return Mode()
