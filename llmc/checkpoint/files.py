"""Name the tensors of a checkpoint as its files do, and say which parameter of the model each one is.

A checkpoint that is written again for servers keeps these names: servers map the names of published
checkpoints to their own, and not those of transformers' current classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmc.graph.files import FilePart, FileTensors

if TYPE_CHECKING:
    from llmc.checkpoint.conversion import ConvertedStore
    from llmc.graph.weights import WeightStore


def converted_files(store: ConvertedStore) -> FileTensors:
    """Return the tensors of the files that a converted store reads, in the order of the files."""
    parts: dict[str, FilePart] = {}
    for parameter, source in store.renamed.items():
        parts[source] = FilePart(parameter)
    for first, conversion in store.conversions.items():
        if conversion.by_row:
            parts.update(_stacked(first, conversion, store.raw))
        else:
            for names in conversion.sources.values():
                parts.update((name, FilePart(first, joined=True)) for name in names)
    return FileTensors(store.raw, parts)


def own_files(store: WeightStore) -> FileTensors:
    """Return the tensors under the names of the model, for a checkpoint whose files have other contents."""
    return FileTensors(store, {name: FilePart(name) for name in store.infos()}, are_files=False)


def linear_parameters(model: Any) -> tuple[str, ...]:
    """Return the names of the weights of all `torch.nn.Linear` of a model, derived classes included."""
    import torch

    return tuple(
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    )


def _stacked(parameter: str, conversion: Any, raw: WeightStore) -> Iterator[tuple[str, FilePart]]:
    """Yield the matrices of experts that a parameter (experts, outputs, inputs) stacks, with their rows."""
    order = [p for p in conversion.converter.source_patterns if p in conversion.sources]
    infos: Mapping[str, Any] = raw.infos()
    start = 0
    for pattern in order:
        names = conversion.sources[pattern]
        stop = start + infos[names[0]].shape[0]
        for expert, name in enumerate(names):
            yield name, FilePart(parameter, expert=expert, rows=(start, stop))
        start = stop
