"""Check that a state begins with zeros, as runtimes give it: a module's own code is run both ways."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmc.errors import UnsupportedError
from llmc.trace.places import Mixer, holding_states, replaced, states_in

if TYPE_CHECKING:
    import torch

_TOLERANCE = 1e-4
#: Scale of the random weights.
_SCALE = 0.2


class Beginnings:
    """Records the arguments with which modules begin, and runs them on random numbers.

    Args:
        model: The model, whose next step is one token without a cache.
        names: Modules that keep a state.
        initial: Attributes of modules before any step, by the modules' names.
    """

    def __init__(
        self, model: torch.nn.Module, names: Iterable[str], initial: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._model, self._initial = model, initial
        self._calls: dict[str, tuple[list[Any], Any]] = {}
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: self._record(name, args, kwargs), with_kwargs=True
            )

    def _record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from torch.utils import _pytree as pytree
        from transformers import Cache

        leaves, spec = pytree.tree_flatten((args, kwargs))
        self._calls[name] = [replaced(x, {}) if isinstance(x, Cache) else x for x in leaves], spec

    def check(self, mixers: Sequence[Mixer]) -> None:
        """Compare the first token without a state to one after zeros, for one mixer of each class.

        Raises:
            UnsupportedError: They differ.
        """
        import torch

        for mixer in {mixer.kind: mixer for mixer in reversed(mixers)}.values():
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                leaves, spec = self._calls[mixer.name]
                numbers = {id(x): _numbers(x) for x in leaves if isinstance(x, torch.Tensor)}
                module = self._with_numbers(mixer)
                given = [numbers.get(id(x), x) for x in leaves]
                first = _run(copy.deepcopy(module), mixer, given, spec, begins=True)
                after = _run(module, mixer, given, spec, begins=False)
            pairs = zip(first, after, strict=True)
            if not all(torch.allclose(a, b, _TOLERANCE, _TOLERANCE) for a, b in pairs):
                raise UnsupportedError(
                    f"layer {mixer.layer} keeps a state by code of its own ({mixer.kind.__name__}), which "
                    "does not begin with zeros",
                    hint="runtimes begin with zeros",
                )

    def _with_numbers(self, mixer: Mixer) -> torch.nn.Module:
        """Copy a module as it was before any step, with random weights."""
        module = self._model.get_submodule(mixer.name)
        known: dict[int, Any] = {}
        for name, part in module.named_modules():
            place = f"{mixer.name}.{name}" if name else mixer.name
            known |= {id(p): _numbers(p, _SCALE) for p in part._parameters.values() if p is not None}
            before = self._initial[place]
            for key in set(vars(part)) & set(before):
                if not key.startswith("_") and vars(part)[key] is not before[key]:
                    setattr(part, key, before[key])
            part._forward_pre_hooks.clear()
            part._forward_hooks.clear()
        return copy.deepcopy(module, known)


def _numbers(like: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return random numbers like a tensor, and zeros like integers."""
    import torch

    shape = [int(n) for n in like.shape]
    if not like.is_floating_point():
        return torch.zeros(shape, dtype=like.dtype)
    made = (torch.randn(shape) * scale).to(like.dtype)
    return torch.nn.Parameter(made, requires_grad=False) if isinstance(like, torch.nn.Parameter) else made


def _run(
    module: torch.nn.Module, mixer: Mixer, leaves: Sequence[Any], spec: Any, *, begins: bool
) -> list[torch.Tensor]:
    """Run a module for one token, without a state or after zeros; return its results and states."""
    import torch
    from torch.utils import _pytree as pytree
    from transformers import Cache

    def run(cache: Any) -> list[torch.Tensor]:
        args, kwargs = pytree.tree_unflatten([cache if isinstance(x, Cache) else x for x in leaves], spec)
        result = pytree.tree_leaves(module(*args, **kwargs))
        return [*(x for x in result if isinstance(x, torch.Tensor)), *states_in(mixer, module, cache)]

    if begins:
        return run(next((x for x in leaves if isinstance(x, Cache)), None))
    rows = next(x.shape[0] for x in leaves if isinstance(x, torch.Tensor))
    zeros = [torch.zeros((rows, *place.shape), dtype=place.dtype) for place in mixer.places]
    with holding_states(mixer, module, zeros) as cache:
        return run(cache)
