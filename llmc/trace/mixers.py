"""Find the modules that keep a state by code of their own, and where it is: by two steps without weights.

A state is a tensor of fixed size that is in the cache object, or in an attribute of a module, after a step,
and that the next step replaces. The module that replaces it is the smallest one during whose call it changes.
Nothing depends on the names of classes or tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llmc.errors import LlmcError
from llmc.graph.interface import StateKind
from llmc.trace.beginnings import Beginnings
from llmc.trace.capture import capturing
from llmc.trace.expert_loops import unroll_expert_loops
from llmc.trace.failure import explain_failure, root_cause
from llmc.trace.places import BATCH, SEQUENCE, Mixer, Output, Path, StatePlace, tensors_in
from llmc.trace.skeleton import build_fake_model
from llmc.trace.stamp import find_layers

if TYPE_CHECKING:
    import torch

#: Rows and tokens of the two first steps, which show what the sizes of tensors depend on.
_STEPS = ((2, 3), (3, 5))
#: Attributes of the layers of transformers' caches.
_KEYS_AND_VALUES = ("keys", "values")
_CONVOLUTIONS = "conv_states"


def find_mixers(config: Any, dtype: torch.dtype) -> list[Mixer]:
    """Find the modules within the decoder layers that keep a state.

    Returns:
        Nothing if the model keeps no state, or also keeps something in another way.

    Raises:
        UnsupportedError: The model's code does not run without weights, or a state does not begin with zeros.
    """
    import torch

    model = build_fake_model(config, dtype, captured=False)
    unroll_expert_loops(model)
    stack = find_layers(model, config.get_text_config(), stamp=False)
    layers = dict(zip(stack.names, stack.indices, strict=True))
    watch = _Watch(model, list(layers))
    mode = next(model.parameters()).fake_mode  # type: ignore[attr-defined]
    try:
        with capturing(), torch.no_grad(), mode:
            for rows, tokens in reversed(_STEPS):
                cache = watch.first(rows, tokens)
            watch.compare(cache)
            kept = watch.kept()
            beginnings = Beginnings(model, kept, watch.initial)
            watch.first(_STEPS[0][0], 1)
    except LlmcError:
        raise
    except Exception as error:  # transformers' model code raises any type of error
        raise explain_failure(model, root_cause(error), ()) from error
    mixers = []
    for name, places in kept.items():
        layer = next(index for layer, index in layers.items() if name.startswith(f"{layer}."))
        kind = type(model.get_submodule(name))
        mixers.append(Mixer(name, kind, layer, places, watch.result_of(name), cache))
    beginnings.check(mixers)
    return mixers


#: A place in the cache, or in the module of that name.
_Key = tuple[str | None, Path]


class _Watch:
    """Observes the calls of every module within the decoder layers; `initial` has their attributes before."""

    def __init__(self, model: torch.nn.Module, layers: list[str]) -> None:
        self.model = model
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if any(name.startswith(f"{layer}.") for layer in layers)
        }
        self.initial = {name: dict(vars(module)) for name, module in self._modules.items()}
        self._results: dict[str, list[Any]] = {}
        self._shapes: list[dict[_Key, tuple[int, ...]]] = []
        self._cache: Any = None
        self._compares = False
        self._before: dict[str, list[dict[_Key, Any]]] = {}
        self._writers: dict[_Key, set[str]] = {}
        self._changed: set[_Key] = set()
        for name, module in self._modules.items():
            module.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            module.register_forward_hook(lambda *given, name=name: self._leave(name, given[-1]))

    def first(self, rows: int, tokens: int) -> Any:
        """Run a first step, and return the cache that the model made, or took if it makes none itself."""
        from transformers import DynamicCache

        cache = self.run(rows, tokens, None)
        if cache is None:
            self._results = {name: found[:-1] for name, found in self._results.items()}
            cache = DynamicCache(config=self.model.config)  # type: ignore[arg-type]
            self.run(rows, tokens, cache)
        self._cache = cache
        self._note_shapes()
        return cache

    def run(self, rows: int, tokens: int, cache: Any) -> Any:
        """Run a step of the model, and return its cache; None if it returns none."""
        import torch

        ids = torch.zeros(rows, tokens, dtype=torch.long)
        given = {} if cache is None else {"cache": cache}
        return getattr(self.model(input_ids=ids, use_cache=True, **given), "cache", None)

    def compare(self, cache: Any) -> None:
        """Run one more token over the cache of the step before, and look for what changes."""
        self._cache = cache
        before = self._marks()
        self._compares = True
        self.run(_STEPS[0][0], 1, cache)
        self._compares = False
        self._note_shapes()
        after = self._marks()
        self._changed = {key for key in after if before.get(key) != after[key]}

    def result_of(self, name: str) -> Any:
        """Return what a module returned in the first steps, with `Output` in place of tensors."""
        import torch
        from torch.utils import _pytree as pytree

        larger, smaller = self._results[name][:2]
        (rows, tokens), (more_rows, more_tokens) = _STEPS
        sizes = {(rows, more_rows): BATCH, (tokens, more_tokens): SEQUENCE}

        def describe(first: Any, second: Any) -> Any:
            if not isinstance(first, torch.Tensor):
                return first
            pairs = zip(first.shape, second.shape, strict=True)
            return Output(tuple(sizes.get((a, b), int(a)) for a, b in pairs), first.dtype)

        return pytree.tree_map(describe, smaller, larger)

    def kept(self) -> dict[str, tuple[StatePlace, ...]]:
        """Return the states that changed, by the smallest module during whose call they did.

        Return nothing if something else changed: of no fixed size, or outside of the layers.
        """
        owners: dict[str, list[StatePlace]] = {}
        types = {key: tensor.dtype for key, tensor in self._states()}
        for key in sorted(self._changed, key=str):
            writers = sorted(self._writers.get(key, ()), key=len)
            shapes = [shapes.get(key) for shapes in self._shapes]
            rows = [more for more, _ in reversed(_STEPS)] + [_STEPS[0][0]]
            size = (shapes[-1] or ())[1:]
            nested = all(b.startswith(f"{a}.") for a, b in pairwise(writers))
            if not writers or not nested or not size or shapes != [(n, *size) for n in rows]:
                return {}
            module, path = key
            kind: StateKind = "conv" if (True, _CONVOLUTIONS) in path else "recurrent"
            owners.setdefault(writers[-1], []).append(StatePlace(kind, module, path, size, types[key]))
        outermost: dict[str, list[StatePlace]] = {}
        for owner in sorted(owners):
            outer = next((name for name in outermost if owner.startswith(f"{name}.")), owner)
            outermost.setdefault(outer, []).extend(owners[owner])
        return {
            owner: tuple(replace(place, module=_within(owner, place.module)) for place in places)
            for owner, places in outermost.items()
        }

    def _note_shapes(self) -> None:
        self._shapes.append({key: tuple(int(n) for n in t.shape) for key, t in self._states()})

    def _states(self) -> Iterator[tuple[_Key, torch.Tensor]]:
        """Yield what may be a state: tensors of numbers, except keys and values of transformers' caches."""
        for path, tensor in tensors_in(self._cache):
            if tensor.is_floating_point() and path[-1][1] not in _KEYS_AND_VALUES:
                yield (None, path), tensor
        for name, module in self._modules.items():
            for key, value in vars(module).items():
                if not key.startswith("_"):
                    for path, tensor in tensors_in(value):
                        if tensor.is_floating_point():
                            yield (name, ((True, key), *path)), tensor

    def _enter(self, name: str) -> None:
        if self._compares:
            self._before.setdefault(name, []).append(self._marks())

    def _leave(self, name: str, result: Any) -> None:
        self._results.setdefault(name, []).append(result)
        if self._compares:
            before, after = self._before[name].pop(), self._marks()
            for place, mark in after.items():
                if before.get(place) != mark:
                    self._writers.setdefault(place, set()).add(name)

    def _marks(self) -> dict[_Key, Any]:
        return {place: (id(tensor), tensor._version) for place, tensor in self._states()}


def _within(outer: str, module: str | None) -> str | None:
    """Return the name of a module relative to one around it."""
    return None if module is None else module.removeprefix(outer).removeprefix(".")
