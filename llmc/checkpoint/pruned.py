"""View a checkpoint without parts of its model: a smaller config, and tensors selected as they are read."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.arrays import Array
from llmc.checkpoint.skeleton import build_skeleton
from llmc.errors import CheckpointError, UnsupportedError
from llmc.graph.weights import TensorInfo, WeightStore

if TYPE_CHECKING:
    from llmc.checkpoint.checkpoint import Checkpoint

#: Suffixes of config lists that do not describe layers, whatever their length.
_NO_LAYERS = ("architectures", "_token_id", "_token_ids")


@dataclass(frozen=True, eq=False)
class Selection:
    """The part of one tensor that remains.

    Args:
        kept: Indices that remain along each shortened axis, ascending.
        file: Safetensors file with new values for the selected part; None to keep the old values.
        key: Name of the new values in `file`.
    """

    kept: Mapping[int, Array] = field(default_factory=dict)
    file: Path | None = None
    key: str = ""

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the part that remains."""
        return tuple(len(self.kept[a]) if a in self.kept else n for a, n in enumerate(before))


@dataclass(frozen=True)
class PrunedStore:
    """A `WeightStore` of tensors under new names, and of parts of tensors.

    Args:
        inner: The original tensors.
        names: Name in `inner` by the new name; tensors without a new name are removed.
        selections: Selection by the new name.
    """

    inner: WeightStore
    names: Mapping[str, str]
    selections: Mapping[str, Selection]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor; a matrix keeps the codes that the checkpoint has only if it is whole."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        before = self.inner.infos()
        selected = {}
        for name, old in self.names.items():
            info = replace(before[old], name=name)
            selection = self.selections.get(name)
            if selection is not None:
                info = replace(info, shape=selection.shape(info.shape), codes=None)
            selected[name] = info
        return selected

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Read rows start:stop along axis 0, in the stored type.

        Raises:
            CheckpointError: The file with new values has been removed.
        """
        selection, old = self.selections.get(name), self.names[name]
        if selection is None:
            return self.inner.read(old, start, stop)
        info = self.inner.infos()[old]
        if selection.file is not None:
            return _read_rows(selection.file, selection.key, start, stop).astype(info.dtype.numpy())
        rows = selection.kept.get(0)
        if rows is None:
            array = self.inner.read(old, start, stop)
        else:
            rows = rows[start:stop]
            first = int(rows[0]) if len(rows) else 0
            last = int(rows[-1]) + 1 if len(rows) else 0
            array = self.inner.read(old, first, last)[rows - first]
        for axis, kept in selection.kept.items():
            if axis:
                array = np.take(array, kept, axis=axis)
        return array


def _read_rows(file: Path, key: str, start: int, stop: int | None) -> Array:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as data:
            rows: Array = data.get_slice(key)[start:stop]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"pruned weights cannot be read from {file}: {error}",
            hint="run the command again: another run has removed them from the cache",
        ) from error
    return rows


def drop_layers(checkpoint: Checkpoint, layers: Sequence[str], kept: Sequence[int]) -> Checkpoint:
    """Return the checkpoint with some of its decoder layers removed.

    Args:
        layers: Qualified names of all decoder layers, in order.
        kept: Indices of the layers that remain, ascending.

    Raises:
        UnsupportedError: transformers cannot build that model, or its layers would differ.
    """
    count = len(layers)
    lists = {
        key: type(value)(value[i] for i in kept)
        for key, value in vars(_text(checkpoint.config)).items()
        if isinstance(value, list | tuple) and len(value) == count and not key.endswith(_NO_LAYERS)
    }
    new = _changed(checkpoint.config, {**lists, "num_hidden_layers": len(kept)})
    renamed = dict(zip((layers[i] for i in kept), layers, strict=False))
    gone = tuple(f"{layers[i]}." for i in range(count) if i not in kept)

    def rename(name: str) -> str | None:
        if name.startswith(gone):
            return None
        layer = next((layer for layer in renamed if name.startswith(f"{layer}.")), None)
        return name if layer is None else renamed[layer] + name.removeprefix(layer)

    names = {new_name: n for n in checkpoint.tensors.infos() if (new_name := rename(n)) is not None}
    tied = dict(_renamed(checkpoint.tied, rename))
    part = _altered(checkpoint, new, PrunedStore(checkpoint.tensors, names, {}), tied, f"layers {list(kept)}")
    _require_shapes(part)
    back = {renamed[layer]: layer for layer in renamed}
    require_alike(checkpoint, part, back, sizes=False)
    return part


def narrow(
    checkpoint: Checkpoint,
    layers: Sequence[str],
    selections: Mapping[str, Selection],
    entries: Sequence[Mapping[str, int]],
    change: str,
) -> Checkpoint:
    """Return the checkpoint with parts of its tensors, and new values for some.

    Args:
        layers: Qualified names of the decoder layers.
        selections: Selection by parameter name.
        entries: Candidate entries of the config; the first that gives a model of these shapes is used.
        change: Digest of what was selected and computed.

    Raises:
        UnsupportedError: No candidate gives such a model.
    """
    store = PrunedStore(checkpoint.tensors, {name: name for name in checkpoint.tensors.infos()}, selections)
    why = "it has no entry for the size"
    for candidate in entries:
        try:
            config = _changed(checkpoint.config, candidate)
            pruned = _altered(checkpoint, config, store, checkpoint.tied, change)
            _require_shapes(pruned)
            require_alike(checkpoint, pruned, {name: name for name in layers}, sizes=True)
        except UnsupportedError as error:
            why = error.fact
        else:
            return pruned
    raise UnsupportedError(
        f"the {checkpoint.config.model_type} config cannot state the pruned model: {why}",
        hint="leave this recipe out of the target, or drop whole layers",
    )


def size_entries(config: Any, old: int, new: int) -> list[dict[str, int]]:
    """Return config entries that may state the size `old`, each with `new` as its value."""
    return [{key: new} for key in _keys(config, old)]


def head_entries(config: Any, old: tuple[int, int], new: tuple[int, int], width: int) -> list[dict[str, int]]:
    """Return the config entries that may be needed for fewer heads.

    Args:
        old: Number of query heads, and of key/value heads.
        new: The new numbers, in the same order.
        width: Width of a head, which some configs state.
    """
    usual = "num_key_value_heads"
    keys = [usual] if hasattr(_text(config), usual) else _keys(config, old[1])
    heads = {"num_attention_heads": new[0]}
    candidates = [{**heads, key: new[1]} for key in keys] + [heads]
    return [entry for candidate in candidates for entry in ({**candidate, "head_dim": width}, candidate)]


def _keys(config: Any, size: int) -> list[str]:
    stated = vars(_text(config)).items()
    return [k for k, v in stated if type(v) is int and v == size and not k.endswith(_NO_LAYERS)]


def _altered(
    checkpoint: Checkpoint, config: Any, store: PrunedStore, tied: Mapping[str, str], change: str
) -> Checkpoint:
    digest = hashlib.sha256(f"{checkpoint.altered}\0{change}".encode()).hexdigest()
    return replace(checkpoint, config=config, tensors=store, tied=tied, altered=digest)


def _changed(config: Any, entries: Mapping[str, Any]) -> Any:
    """Return a copy of a config with other entries.

    Raises:
        UnsupportedError: The config does not accept an entry.
    """
    changed = copy.deepcopy(config)
    for key, value in entries.items():
        try:
            setattr(_text(changed), key, value)
        except Exception as error:  # transformers' configs validate entries with any type of error
            raise UnsupportedError(
                f"the {config.model_type} config does not accept {key}: {error}",
                hint="leave this recipe out of the target",
            ) from error
    return changed


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _renamed(tied: Mapping[str, str], rename: Callable[[str], str | None]) -> Iterator[tuple[str, str]]:
    for absent, stored in tied.items():
        names = rename(absent), rename(stored)
        if names[0] is not None and names[1] is not None:
            yield names[0], names[1]


def _require_shapes(pruned: Checkpoint) -> None:
    """Check that the config's model has exactly the shapes of the stored tensors."""
    model = build_skeleton(pruned.config)
    infos = pruned.tensors.infos()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        info = infos.get(pruned.tied.get(name, name))
        if info is None or info.shape != tuple(parameter.shape):
            raise UnsupportedError(
                f"{name} is {tuple(parameter.shape)} by the config, but "
                + ("missing" if info is None else f"{info.shape} after pruning"),
                hint="leave this recipe out of the target",
            )


def require_alike(before: Checkpoint, after: Checkpoint, layers: Mapping[str, str], *, sizes: bool) -> None:
    """Check that the layers of the pruned model compute the same as before: only their sizes may differ.

    Args:
        layers: Name of each layer of the pruned model -> its name before pruning.
        sizes: Whether whole numbers that state the size of a layer may differ.
    """
    old, new = build_skeleton(before.config), build_skeleton(after.config)
    for name, was in layers.items():
        parts = (dict(m.get_submodule(n).named_modules()) for m, n in ((new, name), (old, was)))
        now, then = ({k: _facts(m, sizes=sizes) for k, m in each.items()} for each in parts)
        odd = next((k for k in sorted(now.keys() | then.keys()) if now.get(k) != then.get(k)), None)
        if odd is not None:
            raise UnsupportedError(
                f"{'.'.join(p for p in (name, odd) if p)} of the pruned model would differ from {was}",
                hint="leave this recipe out of the target",
            )


def _facts(module: Any, *, sizes: bool) -> dict[str, Any]:
    """Return what determines the computation of a module, except its parameters."""
    plain = (bool, str, float, type(None)) if sizes else (bool, str, float, type(None), int, list, tuple)
    facts = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "layer_idx"}
    return {**facts, "class": type(module), "buffers": {n: b.shape for n, b in module.named_buffers()}}
