"""Find the modules that keep a state by code of their own, and where it is: by two steps without weights.

A state is a tensor of fixed size that is in the cache object, or in an attribute of a module, after a step,
and that the next step replaces. The module that replaces it is the smallest one during whose call it changes.
Nothing depends on the names of classes or tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmc.graph.interface import StateKind
from llmc.trace.capture import capturing
from llmc.trace.expert_loops import unroll_expert_loops
from llmc.trace.places import Path, tensors_in
from llmc.trace.skeleton import build_fake_model
from llmc.trace.stamp import find_layers

if TYPE_CHECKING:
    import torch

#: Rows and tokens of the two first steps, which show what the sizes of tensors depend on.
_STEPS = ((2, 3), (3, 5))
#: Attributes of the layers of transformers' caches.
_KEYS_AND_VALUES = ("keys", "values")
_CONVOLUTIONS = "conv_states"
BATCH, SEQUENCE = "batch", "sequence"


@dataclass(frozen=True)
class Place:
    """A place of a state: in the cache, or in an attribute of a module within the mixer.

    Args:
        kind: What runtimes take it for: "conv" if it is where transformers' caches have the inputs of
            convolutions.
        module: Name of the module, relative to the mixer; None if the state is in the cache.
    """

    kind: StateKind
    module: str | None
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Output:
    """A tensor that a mixer returns; its sizes are numbers, `BATCH` or `SEQUENCE`."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Mixer:
    """A module that keeps a state.

    Args:
        name: Its qualified name.
        kind: Its class.
        layer: The index by which its layer addresses the cache.
        places: Where its states are after a step.
        result: What it returns, with `Output` in place of tensors.
        cache: The cache after a step, whose states are replaced.
    """

    name: str
    kind: type
    layer: int
    places: tuple[Place, ...]
    result: Any
    cache: Any


def find_mixers(config: Any, dtype: torch.dtype) -> list[Mixer]:
    """Find the modules within the decoder layers that keep a state.

    Modules that keep a state in a way that has no such form are left out.
    """
    import torch

    model = build_fake_model(config, dtype, captured=False)
    unroll_expert_loops(model)
    stack = find_layers(model, config.get_text_config(), stamp=False)
    layers = dict(zip(stack.names, stack.indices, strict=True))
    watch = _Watch(model, list(layers))
    mode = next(model.parameters()).fake_mode  # type: ignore[attr-defined]
    with capturing(), torch.no_grad(), mode:
        for rows, tokens in reversed(_STEPS):
            cache = watch.first(rows, tokens)
        watch.compare(cache)
        watch.run(_STEPS[0][0], 1, cache)
    found = []
    for name, places in watch.kept().items():
        layer = next((i for n, i in layers.items() if name.startswith(f"{n}.")), None)
        if layer is not None:
            module = model.get_submodule(name)
            found.append(Mixer(name, type(module), layer, places, watch.result_of(name), cache))
    return found


class _Watch:
    """Observes the calls of every module within the decoder layers."""

    def __init__(self, model: torch.nn.Module, layers: list[str]) -> None:
        self.model = model
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if any(name.startswith(f"{layer}.") for layer in layers)
        }
        self._results: dict[str, list[Any]] = {}
        self._cache: Any = None
        self._compares = False
        self._before: dict[str, list[dict[tuple[str | None, Path], Any]]] = {}
        self._writers: dict[tuple[str | None, Path], set[str]] = {}
        self._tensors: dict[tuple[str | None, Path], torch.Tensor] = {}
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
        return cache

    def run(self, rows: int, tokens: int, cache: Any) -> Any:
        """Run a step of the model, and return its cache; None if it returns none."""
        import torch

        ids = torch.zeros(rows, tokens, dtype=torch.long)
        given = {} if cache is None else {"cache": cache}
        return getattr(self.model(input_ids=ids, use_cache=True, **given), "cache", None)

    def compare(self, cache: Any) -> None:
        """Look for states that change from now on."""
        self._compares, self._cache = True, cache
        self._tensors = dict(self._states())

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

    def kept(self) -> dict[str, tuple[Place, ...]]:
        """Return the states that changed, by the smallest module during whose call they did."""
        owners: dict[str, list[Place]] = {}
        for (module, path), writers in self._writers.items():
            tensor = self._tensors.get((module, path))
            owner = max(writers, key=len)
            if tensor is None or not all(owner == name or owner.startswith(f"{name}.") for name in writers):
                continue
            kind: StateKind = "conv" if (True, _CONVOLUTIONS) in path else "recurrent"
            place = Place(kind, module, path, tuple(int(n) for n in tensor.shape[1:]), tensor.dtype)
            owners.setdefault(owner, []).append(place)
        outermost: dict[str, list[Place]] = {}
        for owner in sorted(owners):
            outer = next((name for name in outermost if owner.startswith(f"{name}.")), owner)
            outermost.setdefault(outer, []).extend(owners[owner])
        return {
            owner: tuple(replace(place, module=_within(owner, place.module)) for place in places)
            for owner, places in outermost.items()
        }

    def _states(self) -> Iterator[tuple[tuple[str | None, Path], torch.Tensor]]:
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

    def _marks(self) -> dict[tuple[str | None, Path], Any]:
        return {place: (id(tensor), tensor._version) for place, tensor in self._states()}


def _within(outer: str, module: str | None) -> str | None:
    """Return the name of a module relative to one around it."""
    return None if module is None else module.removeprefix(outer).removeprefix(".")
