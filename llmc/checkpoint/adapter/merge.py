"""What an adapter changes in a base, and the base's tensors with it, changed while they are read."""

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
#: Makes the changed rows of a tensor from the base's.
Change = Callable[[Rows], Rows]


@dataclass(frozen=True)
class Merged:
    """A base with an adapter in it: what `Checkpoint` says of the same fields."""

    config: Any
    tensors: WeightStore
    tied: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Merge:
    """What an adapter changes in a base model.

    Args:
        own: By parameter of transformers' model.
        files: By tensor of the files, of which transformers makes parameters.
        record: What the manifest keeps.
        notes: Sentences for the user.
    """

    adapter: Adapter
    own: Mapping[str, Change]
    files: Mapping[str, Change]
    record: AdapterRecord
    notes: tuple[str, ...]

    def apply(self, config: Any, tensors: WeightStore, tied: Mapping[str, str]) -> Merged:
        """The base's parameters with the changes in `own`.

        A matrix that is tied to another stays so where the adapter changes both alike, or asks for it; else
        it becomes one of its own.
        """
        changes, names, left = dict(self.own), dict[str, str](), dict(tied)
        notes = []
        for absent, stored in tied.items():
            if absent not in changes and stored not in changes:
                continue
            if self._keeps_tie(absent, stored):
                changes[stored] = changes.get(stored) or changes[absent]
                changes.pop(absent, None)
                continue
            names[absent] = stored
            del left[absent]
            which = " and ".join(name for name in (absent, stored) if name in changes)
            notes.append(f"{absent} and {stored} are not tied any more: the adapter changes {which}.")
        return Merged(
            _untied(config) if names else config, AdaptedStore(tensors, changes, names), left, tuple(notes)
        )

    def tokenizer_notes(self, base: Path) -> tuple[str, ...]:
        """A sentence about the adapter's tokenizer, where it is another than the base's."""
        if not self.adapter.has_tokenizer or _same_files(self.adapter.path, base):
            return ()
        return (f"The tokenizer and its chat template are those of the adapter {self.adapter.ref}.",)

    def _keeps_tie(self, absent: str, stored: str) -> bool:
        """Whether two tied tensors stay one: both change by the same, or peft changes them together."""
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
    """A copy of a config whose head has weights of its own."""
    made = copy.deepcopy(config)
    for each in (made, made.get_text_config(decoder=True)):
        each.tie_word_embeddings = False
    return made


class AdaptedStore:
    """A `WeightStore` with some of its tensors changed.

    Args:
        inner: The tensors as they were.
        changes: By the name in this store.
        names: Name in `inner` by the name in this store, where they differ.
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
        """Every tensor; a changed one is float32, and has no codes."""
        return self._infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop along axis 0."""
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
