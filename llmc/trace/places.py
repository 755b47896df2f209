"""Describe where states are: find the tensors that an object holds, and put others in their place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmc.graph.interface import StateKind

if TYPE_CHECKING:
    import torch

#: The way to a tensor: attributes and keys, each with whether it is an attribute.
Path = tuple[tuple[bool, Any], ...]

#: Sizes that depend on the step.
BATCH, SEQUENCE = "batch", "sequence"
_DEPTH = 6


@dataclass(frozen=True)
class StatePlace:
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
    places: tuple[StatePlace, ...]
    result: Any
    cache: Any


def tensors_in(root: Any) -> Iterator[tuple[Path, torch.Tensor]]:
    """Yield the tensors that `root` holds, each with the way to it; models and their parts are left out."""
    yield from _walk(root, (), set())


def _walk(value: Any, path: Path, seen: set[int]) -> Iterator[tuple[Path, torch.Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if id(value) in seen or len(path) > _DEPTH:
        return
    seen.add(id(value))
    for step, child in _children(value):
        yield from _walk(child, (*path, step), seen)


def _children(value: Any) -> Iterator[tuple[tuple[bool, Any], Any]]:
    import torch

    if isinstance(value, dict):
        yield from (((False, key), child) for key, child in value.items())
    elif isinstance(value, (list, tuple)):
        yield from (((False, n), child) for n, child in enumerate(value))
    elif (
        hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)) and not callable(value)
    ):
        yield from (((True, key), child) for key, child in vars(value).items())


def replaced(root: Any, tensors: Mapping[Path, torch.Tensor]) -> Any:
    """Return a copy of `root` with other tensors in some places; it shares all other tensors with `root`."""
    import torch

    def rebuild(value: Any, path: Path, depth: int) -> Any:
        if path in tensors:
            return tensors[path]
        if isinstance(value, torch.Tensor) or depth > _DEPTH:
            return value
        children = {step: rebuild(child, (*path, step), depth + 1) for step, child in _children(value)}
        if isinstance(value, dict):
            made = copy.copy(value)
            made.update({key: child for (_, key), child in children.items()})
            return made
        if isinstance(value, (list, tuple)):
            return type(value)(children.values())
        if not children:
            return value
        made = copy.copy(value)
        for (_, key), child in children.items():
            vars(made)[key] = child
        return made

    return rebuild(root, (), 0)


def tensor_at(root: Any, path: Path) -> torch.Tensor:
    """Return the tensor in a place."""
    for attribute, key in path:
        root = vars(root)[key] if attribute else root[key]
    return root  # type: ignore[no-any-return]


@contextmanager
def holding_states(mixer: Mixer, module: torch.nn.Module, states: Sequence[torch.Tensor]) -> Iterator[Any]:
    """Put `states` in the places of a mixer within this context.

    Args:
        module: The mixer's module, or a copy of it.
        states: A state for each place, (batch, …).

    Yields:
        The cache that holds those of them that are in the cache.
    """
    pairs = list(zip(mixer.places, states, strict=True))
    before: list[tuple[dict[str, Any], str, Any]] = []
    for place, state in pairs:
        if place.module is not None:
            held = vars(module.get_submodule(place.module))
            (_, key), *rest = place.path
            before.append((held, key, held[key]))
            held[key] = replaced(held[key], {tuple(rest): state})
    try:
        yield replaced(mixer.cache, {place.path: state for place, state in pairs if place.module is None})
    finally:
        for held, key, value in reversed(before):
            held[key] = value


def states_in(mixer: Mixer, module: torch.nn.Module, cache: Any) -> list[torch.Tensor]:
    """Return the states that are in the places of a mixer, (batch, …) each."""
    return [
        tensor_at(cache if place.module is None else module.get_submodule(place.module), place.path)
        for place in mixer.places
    ]
