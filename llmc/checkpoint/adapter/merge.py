"""Describe the changes that an adapter makes to a base, and apply them while the base's tensors are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llmc.arrays import Array
from llmc.artifact.manifest import AdapterRecord
from llmc.checkpoint import tokenizer
from llmc.checkpoint.adapter.folder import Adapter
from llmc.checkpoint.adapter.names import sort_tensors
from llmc.checkpoint.ties import equal_rows
from llmc.graph.weights import Rows, StoredRows, TensorInfo, WeightStore

_CODES = "an adapter changes its values"
#: Function from the base's rows of a tensor to the changed rows.
Change = Callable[[Rows], Rows]


@dataclass(frozen=True)
class Merged:
    """A base with a merged adapter; the fields have the same meaning as in `Checkpoint`."""

    config: Any
    tensors: WeightStore
    tied: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Merge:
    """The changes that an adapter makes to a base model.

    Args:
        own: Changes by parameter of transformers' model.
        files: Changes by tensor in the files, from which transformers makes parameters.
        record: Entry for the manifest.
        notes: Sentences for the user.
    """

    adapter: Adapter
    own: Mapping[str, Change]
    files: Mapping[str, Change]
    record: AdapterRecord
    notes: tuple[str, ...]

    def apply(self, config: Any, tensors: WeightStore, tied: Mapping[str, str]) -> Merged:
        """Apply the changes in `own` to the base's parameters.

        Two tied matrices stay tied if the adapter changes both alike or asks for it; otherwise they become
        separate.
        """
        changes, names, ties = dict(self.own), dict[str, str](), dict(tied)
        notes = []
        for absent, stored in tied.items():
            if absent not in changes and stored not in changes:
                continue
            if self._keeps_tie(absent, stored):
                changes[stored] = changes.get(stored) or changes[absent]
                changes.pop(absent, None)
                continue
            names[absent] = stored
            del ties[absent]
            which = " and ".join(name for name in (absent, stored) if name in changes)
            notes.append(f"{absent} and {stored} are no longer tied: the adapter changes {which}.")
        return Merged(
            _untied(config) if names else config, AdaptedStore(tensors, changes, names), ties, tuple(notes)
        )

    def tokenizer_notes(self, base: Path) -> tuple[str, ...]:
        """Return a sentence about the adapter's tokenizer, if it differs from the base's."""
        if not self.adapter.has_tokenizer or _same_files(self.adapter.path, base):
            return ()
        return (f"The tokenizer and its chat template come from the adapter {self.adapter.ref}.",)

    def _keeps_tie(self, absent: str, stored: str) -> bool:
        """Return whether two tied tensors stay one: both change alike, or peft changes them together."""
        if self.adapter.config.tie or self.adapter.config.tokens:
            return True
        _, whole = sort_tensors(self.adapter.tensors.infos())
        both = [whole[name] for name in (absent, stored) if name in whole]
        return len(both) == 2 and equal_rows(self.adapter.tensors, both[0], both[1])


def _same_files(folder: Path, other: Path) -> bool:
    files = tokenizer.tokenizer_files(folder)
    pairs = [(file, other / file.name) for file in files if (other / file.name).is_file()]
    return len(pairs) == len(files) and all(a.read_bytes() == b.read_bytes() for a, b in pairs)


def _untied(config: Any) -> Any:
    """Return a copy of a config whose head has its own weights."""
    untied = copy.deepcopy(config)
    for each in (untied, untied.get_text_config(decoder=True)):
        each.tie_word_embeddings = False
    return untied


class AdaptedStore:
    """A `WeightStore` with some of its tensors changed.

    Args:
        inner: The unchanged tensors.
        changes: Changes by the name in this store.
        names: Name in `inner` by the name in this store, if they differ.
    """

    def __init__(
        self, inner: WeightStore, changes: Mapping[str, Change], names: Mapping[str, str] | None = None
    ) -> None:
        self._inner = inner
        self._names = names or {}
        before = inner.infos()
        sources = {name: before[self._names.get(name, name)] for name in (*before, *self._names)}
        self._rows = {name: change(StoredRows(inner, sources[name])) for name, change in changes.items()}
        self._infos = {name: self._info(name, info) for name, info in sorted(sources.items())}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor; a changed tensor is float32 and has no codes."""
        return self._infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Read rows start:stop along axis 0."""
        rows = self._rows.get(name)
        if rows is None:
            return self._inner.read(self._names.get(name, name), start, stop)
        low, high, _ = slice(start, stop).indices(rows.shape[0])
        return rows.rows(low, max(low, high)).astype(self._infos[name].dtype.numpy(), copy=False)

    def _info(self, name: str, info: TensorInfo) -> TensorInfo:
        if name not in self._rows:
            return replace(info, name=name)
        codes = None if info.codes is None else lambda: _CODES
        return TensorInfo(name, info.shape, ir.DataType.FLOAT, codes)
