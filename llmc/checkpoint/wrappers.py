"""Remove the prefixes that wrappers of PyTorch or peft put before tensor names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from llmc.arrays import Array
from llmc.errors import CheckpointError
from llmc.graph.weights import TensorInfo, WeightStore

#: Modules that hold a model as their only child: torch.compile, DDP, FSDP and activation checkpointing.
_INNER = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = ("module", "base_model")


class RenamedStore:
    """The tensors of `inner` under other names.

    Args:
        names: Name in `inner` by the new name, for every tensor.
    """

    def __init__(self, inner: WeightStore, names: Mapping[str, str]) -> None:
        self._inner = inner
        self._names = names
        self._infos = MappingProxyType({new: inner.infos()[old] for new, old in names.items()})

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        return self._inner.read(self._names[name], start, stop)


def unwrap(store: WeightStore, is_known: Callable[[str], bool]) -> tuple[WeightStore, tuple[str, ...]]:
    """Return the tensors without the prefixes of wrappers, and a note; `store` itself if there are none.

    Args:
        is_known: Returns whether a name leads to a parameter of the model.

    Raises:
        CheckpointError: The names have a wrapper's prefix, but do not match the model without it either.
    """
    names = list(store.infos())
    bare = [_INNER.sub("", name) for name in names]
    inner = bare != names
    common = _common_parts(bare)
    if not inner and (not common or any(map(is_known, names))):
        return store, ()
    for count in range(len(common) + 1):
        prefix = "".join(f"{part}." for part in common[:count])
        without = {name.removeprefix(prefix): own for name, own in zip(bare, names, strict=True)}
        if len(without) == len(names) and all(map(is_known, without)):
            new, old = next(iter(without.items()))
            note = f"Tensor names are read as {new} instead of {old}: a wrapper was saved with the model."
            return RenamedStore(store, without), (note,)
    if inner or common[0] in _OUTER:
        raise CheckpointError(
            f"tensor names begin like {names[0]}: a wrapper was saved with the model, and without its prefix "
            "some names do not belong to the model",
            hint="save the wrapped model itself with save_pretrained",
        )
    return store, ()


def _common_parts(names: list[str]) -> list[str]:
    """Return the components that all names begin with."""
    if not names:
        return []
    first, last = min(names).split("."), max(names).split(".")
    count = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(count, len(first) - 1, len(last) - 1)]
