"""Read tensors under the model's names, with transformers' renamings and merges applied while reading.

transformers loads old names, per-expert matrices and fused projections through one mapping per model
(`conversion_mapping`, `core_model_loading`). This module runs the same mapping and the same operations, one
target tensor at a time: on meta tensors when opening, to check every shape, and on rows from the files when
a tensor is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.checkpoint.ranges import WholeValues
from llmc.checkpoint.rearrange import Arrangement, find_arrangement, probe, probe_shapes, rearrange
from llmc.checkpoint.stacks import stack_codes
from llmc.checkpoint.ties import equal_rows, resolve_ties
from llmc.errors import CheckpointError, UnsupportedError, count_names
from llmc.graph.weights import TensorInfo, WeightStore

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Converted:
    """A store under the model's names, with tied names and leftovers.

    Args:
        store: Every tensor in the files that the model uses.
        tied: Name of an absent parameter -> stored name of the same parameter.
        unused: Names in the files that no parameter of the model uses -> the name after the renamings.
            Copies of used tensors are not included.
    """

    store: WeightStore
    tied: Mapping[str, str]
    unused: Mapping[str, str]


@dataclass(frozen=True)
class _Conversion:
    """One application of a `WeightConverter`: its source tensors by pattern, and its targets."""

    first_target: str
    converter: Any
    sources: Mapping[str, tuple[str, ...]]
    by_row: bool  # row i of the target needs only source i of each pattern


class ConvertedStore:
    """A `WeightStore` under the parameter names of a transformers model.

    Args:
        raw: The tensors of the files.
        renamed: Name in the files by the name of the parameter, where they are the same tensor.
        conversions: How a parameter is made of other tensors of the files.
    """

    def __init__(
        self,
        raw: WeightStore,
        model: PreTrainedModel,
        renamed: Mapping[str, str],
        conversions: Mapping[str, _Conversion],
        infos: Mapping[str, TensorInfo],
    ) -> None:
        self.raw = raw
        self._model = model
        self.renamed = renamed
        self.conversions = conversions
        self._infos = MappingProxyType(dict(sorted(infos.items())))
        self._whole = WholeValues()

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        if name in self.renamed:
            return self.raw.read(self.renamed[name], start, stop)
        conversion = self.conversions[name]
        if conversion.by_row:
            return self._convert(name, conversion, slice(start, stop))
        return self._whole.rows(name, lambda: self._convert(name, conversion, slice(None)), start, stop)

    def without(self, names: set[str]) -> ConvertedStore:
        """Return the same store without some tensors."""
        infos = {name: info for name, info in self._infos.items() if name not in names}
        return ConvertedStore(self.raw, self._model, self.renamed, self.conversions, infos)

    def _convert(self, name: str, conversion: _Conversion, rows: slice) -> Array:
        def reader(source: str) -> Callable[[], torch.Tensor]:
            return lambda: _to_torch(self.raw.read(source))

        chosen = {
            pattern: [reader(source) for source in sources[rows]]
            for pattern, sources in conversion.sources.items()
        }
        if not all(chosen.values()):
            return np.empty((0, *self._infos[name].shape[1:]), self._infos[name].dtype.numpy())
        return _to_numpy(_run(conversion.first_target, conversion.converter, chosen, self._model)[name])


def model_mapping(model: PreTrainedModel) -> list[Any]:
    """Return transformers' own list of renamings and converters for checkpoints of this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping: list[Any] = get_model_conversion_mapping(model)
    return mapping


def convert_store(raw: WeightStore, model: PreTrainedModel, mapping: list[Any]) -> Converted:
    """Expose the tensors of `raw` under the names of `model`, and check them against it.

    Raises:
        CheckpointError: A tensor is missing, or its shape differs from the shape that the config implies.
        UnsupportedError: A tensor holds integers where the model has floats.
    """
    expected = dict(model.state_dict())
    renamed, conversions, infos, unused = _plan(raw, model, mapping, expected)
    _check_types(infos, model, expected)
    for name, info in infos.items():
        shape = tuple(expected[name].shape)
        if info.shape != shape:
            origin = renamed.get(name) or _sources_text(conversions[name].sources)
            raise CheckpointError(
                f"{name} has shape {list(info.shape)} in the files (from {origin}), "
                f"but the config implies {list(shape)}",
                hint="config and weights must belong to the same model",
            )
    store = ConvertedStore(raw, model, renamed, conversions, infos)
    ties = resolve_ties(model, store)
    _check_missing(model, set(infos) | set(ties.tied))
    left = {source: target for source, target in unused.items() if target not in renamed}
    for source in unused.keys() - left.keys():
        _check_copy(raw, renamed[unused[source]], source)
    return Converted(store.without(ties.duplicates), ties.tied, left)


def name_check(model: PreTrainedModel, mapping: list[Any]) -> Callable[[str], bool]:
    """Return a test whether a name in the files leads to a parameter or buffer of `model`."""
    expected = set(model.state_dict())
    rename = _renaming(model, mapping)
    return lambda name: rename(name)[0] in expected


def rename_to_model(model: PreTrainedModel, mapping: list[Any]) -> Callable[[str], str | None]:
    """Return a function from a name in the files to the parameter or buffer of `model` that it stands for.

    It returns None for a name that stands for none, or that transformers joins with others into a parameter.
    """
    expected = set(model.state_dict())
    rename = _renaming(model, mapping)

    def find(name: str) -> str | None:
        target, joined = rename(name)
        return target if target in expected and joined is None else None

    return find


def _renaming(model: PreTrainedModel, mapping: list[Any]) -> Callable[[str], tuple[str, str | None]]:
    """Return a function from a name in the files to the model's name and the converter's pattern, if any."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    expected = dict(model.state_dict())
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    return lambda name: rename_source_key(name, renamings, converters, prefix, expected)


def _check_types(
    infos: Mapping[str, TensorInfo], model: PreTrainedModel, expected: Mapping[str, torch.Tensor]
) -> None:
    codes = [
        name
        for name, info in infos.items()
        if expected[name].is_floating_point() and not info.dtype.is_floating_point()
    ]
    if codes:
        raise UnsupportedError(
            f"{count_names(codes)} in the files hold integers ({infos[codes[0]].dtype.name}) where "
            f"{type(model).__name__} has floats: these are codes of quantized weights, and config.json does "
            "not say how to read them",
            hint="add the quantization_config to config.json, or compile the original checkpoint in float",
        )


def _check_copy(raw: WeightStore, used: str, other: str) -> None:
    if not equal_rows(raw, used, other):
        raise CheckpointError(
            f"{used} and {other} in the files are the same parameter of the model, but their values differ",
            hint="remove the tensor that does not belong to the model from the files",
        )


def _plan(
    raw: WeightStore, model: PreTrainedModel, mapping: list[Any], expected: dict[str, torch.Tensor]
) -> tuple[dict[str, str], dict[str, _Conversion], dict[str, TensorInfo], dict[str, str]]:
    """Assign file tensors to parameters, as in the loop of `convert_and_load_state_dict_in_model`."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix

    renamed: dict[str, str] = {}
    collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    unused: dict[str, str] = {}
    for source in sorted(raw.infos(), key=dot_natural_key):
        target, pattern = rename_source_key(source, renamings, converters, prefix, expected)
        if target not in expected and source in expected:
            target, pattern = rename_source_key(source, [], [], prefix, expected)
        if target not in expected or target in renamed or (pattern is None and target in collected):
            unused[source] = target
        elif pattern is None:
            renamed[target] = source
        else:
            _, by_source_pattern = collected.setdefault(target, (by_pattern[pattern], {}))
            by_source_pattern.setdefault(pattern, []).append(source)

    infos = {name: replace(info, name=name) for name, info in _infos_of(raw, renamed).items()}
    conversions: dict[str, _Conversion] = {}
    for first, (converter, lists) in collected.items():
        sources = {pattern: tuple(names) for pattern, names in lists.items()}
        targets = _describe(raw, model, first, converter, sources)
        produced = {name: info for name, info in targets.items() if name in expected}
        conversion = _Conversion(first, converter, sources, _is_by_row(converter, sources, produced))
        conversions.update(dict.fromkeys(produced, conversion))
        infos.update({name: _with_codes(raw, model, conversion, info) for name, info in produced.items()})
    return renamed, conversions, infos, unused


def _with_codes(
    raw: WeightStore, model: PreTrainedModel, conversion: _Conversion, info: TensorInfo
) -> TensorInfo:
    """Add the codes to the description of a stack of quantized experts."""
    if info.codes is None or not conversion.by_row:
        return info
    order = [pattern for pattern in conversion.converter.source_patterns if pattern in conversion.sources]
    patterns = [conversion.sources[pattern] for pattern in order]
    alone = ConvertedStore(raw, model, {}, {info.name: conversion}, {info.name: info})
    return replace(info, codes=stack_codes(raw, patterns, info.shape, lambda: alone.read(info.name, 0, 1)))


def _infos_of(raw: WeightStore, renamed: Mapping[str, str]) -> dict[str, TensorInfo]:
    stored = raw.infos()
    return {target: stored[source] for target, source in renamed.items()}


def _describe(
    raw: WeightStore,
    model: PreTrainedModel,
    first: str,
    converter: Any,
    sources: Mapping[str, tuple[str, ...]],
) -> dict[str, TensorInfo]:
    """Describe the results of a conversion by running it on the meta device.

    Raises:
        CheckpointError: The sources do not fit together.
    """
    import torch

    stored = raw.infos()

    def fake(source: str) -> Callable[[], torch.Tensor]:
        info = stored[source]
        dtype = _to_torch(np.empty(0, info.dtype.numpy())).dtype
        return lambda: torch.empty(info.shape, dtype=dtype, device="meta")

    fakes = {pattern: [fake(source) for source in names] for pattern, names in sources.items()}
    try:
        targets = _run(first, converter, fakes, model)
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{first} cannot be made from {_sources_text(sources)}: {str(error).strip().splitlines()[0]}",
            hint="tensors are missing, or config and weights do not belong to the same model",
        ) from error
    infos = [stored[name] for group in sources.values() for name in group]
    arrangements = _arrangements(model, first, converter, sources, stored)
    return {
        name: TensorInfo(
            name,
            tuple(t.shape),
            ir.DataType.from_numpy(_to_numpy(t.new_empty(0, device="cpu")).dtype),
            rearrange(infos, arrangements.get(name)),
        )
        for name, t in targets.items()
    }


def _arrangements(
    model: PreTrainedModel,
    first: str,
    converter: Any,
    sources: Mapping[str, tuple[str, ...]],
    stored: Mapping[str, TensorInfo],
) -> dict[str, Arrangement]:
    """Find the targets of a conversion that consist of whole rows of quantized sources."""
    import torch

    names = [name for group in sources.values() for name in group]
    if not any(stored[name].codes is not None for name in names):
        return {}
    if any(len(stored[name].shape) != 2 for name in names):
        return {}
    for width in {shape[1]: None for shape in probe_shapes(stored[names[0]].shape)}:
        probes: dict[str, torch.Tensor] = {}
        row = 0
        for name in names:
            probes[name] = torch.from_numpy(probe((stored[name].shape[0], width), row * width))
            row += stored[name].shape[0]
        readers: dict[str, list[Callable[[], torch.Tensor]]] = {
            pattern: [partial(probes.__getitem__, n) for n in group] for pattern, group in sources.items()
        }
        try:
            targets = _run(first, converter, readers, model)
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError):
            continue  # the converter needs all columns, or rearranges more than rows
        arrangements = {name: find_arrangement(_to_numpy(value), width) for name, value in targets.items()}
        return {name: arrangement for name, arrangement in arrangements.items() if arrangement is not None}
    return {}


def _run(
    first: str,
    converter: Any,
    readers: Mapping[str, list[Callable[[], torch.Tensor]]],
    model: PreTrainedModel,
) -> dict[str, torch.Tensor]:
    """Apply a transformers converter to tensors that are read when the converter reaches them."""
    fresh = copy.deepcopy(converter)
    for pattern, functions in readers.items():
        for function in functions:
            fresh.add_tensor(first, first, pattern, function)
    targets = fresh.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in targets.items()}


def _is_by_row(
    converter: Any, sources: Mapping[str, tuple[str, ...]], produced: Mapping[str, TensorInfo]
) -> bool:
    """Return whether the target stacks its sources along axis 0 and no later operation mixes the rows."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *rest = converter.operations
    return (
        len(produced) == 1
        and type(first) is MergeModulelist
        and first.dim == 0
        and all(type(op) is Concatenate and op.dim > 0 for op in rest)
        and len({len(names) for names in sources.values()}) == 1
    )


def _check_missing(model: PreTrainedModel, available: set[str]) -> None:
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in available and not any(pattern.search(name) for pattern in ignored)
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"the files lack {', '.join(missing[:3])}{more}, which {type(model).__name__} has",
            hint="config and weights must belong to the same causal language model",
        )


def _sources_text(sources: Mapping[str, tuple[str, ...]]) -> str:
    names = [name for group in sources.values() for name in group]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}, {len(names)} tensors"


def _to_torch(array: Array) -> torch.Tensor:
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(tensor: torch.Tensor) -> Array:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()
