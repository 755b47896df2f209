"""Find parameters that share their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmc.errors import CheckpointError
from llmc.graph.weights import StoredRows, WeightStore, row_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ties:
    """The names that refer to the same parameter.

    Args:
        tied: Name that must not be read -> stored name that has its values.
        duplicates: Names of `tied` that the files store as well, with equal values.
    """

    tied: Mapping[str, str]
    duplicates: set[str]


def resolve_ties(model: PreTrainedModel, store: WeightStore) -> Ties:
    """Find the stored name of each parameter that `model` has under several names.

    Raises:
        CheckpointError: Two of the names are stored with different values.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    tied: dict[str, str] = {}
    duplicates: set[str] = set()
    for names in groups.values():
        stored = [name for name in names if name in store.infos()]
        if not stored:
            continue
        for name in names:
            if name == stored[0]:
                continue
            if name in stored:
                _check_equal(store, stored[0], name)
                duplicates.add(name)
            tied[name] = stored[0]
    return Ties(tied, duplicates)


def equal_rows(store: WeightStore, first: str, second: str) -> bool:
    """Return whether two tensors have the same shape and values; read both a few rows at a time."""
    info = store.infos()[first]
    return info.shape == store.infos()[second].shape and all(
        np.array_equal(store.read(first, start, stop), store.read(second, start, stop))
        for start, stop in row_chunks(StoredRows(store, info))
    )


def _check_equal(store: WeightStore, first: str, second: str) -> None:
    if not equal_rows(store, first, second):
        raise CheckpointError(
            f"{first} and {second} differ in the files, but the config ties them",
            hint="set tie_word_embeddings to false in config.json if they are meant to differ",
        )
