"""Run transformers' model code on the tensors of a checkpoint: all in memory, or one module at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmc.arrays import Array
from llmc.checkpoint.skeleton import build_hollow
from llmc.errors import CheckpointError
from llmc.graph.weights import StoredRows, WeightStore, row_chunks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


#: Largest float32 size in bytes of a layer's weights in memory; larger layers are computed in blocks.
BLOCK_BYTES = 256 << 20


def fill_model(
    config: PreTrainedConfig,
    tensors: WeightStore,
    tied: Mapping[str, str],
    attention: Literal["eager"] | None = "eager",
) -> PreTrainedModel:
    """Build the model with every parameter in memory, float32.

    Only the parameters and a few rows take memory, whereas `from_pretrained` holds several copies of what it
    converts. The values are the same.

    Args:
        tensors: Every stored parameter and persistent buffer, by name.
        tied: Name of an absent parameter -> name of the stored parameter whose values it shares.
        attention: Implementation of attention; None for the one that transformers chooses.

    Raises:
        CheckpointError: A parameter is missing from the files.
        UnsupportedError: transformers cannot build the model.
    """
    model = build_hollow(config, attention)
    fill_buffers(model, tensors)
    parameters: dict[str, torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        for own in _parameter_names(module):
            full = _join(name, own)
            source = tied.get(full, full)
            if source not in parameters:
                parameters[source] = _parameter(_read(tensors, source))
            module._parameters[own] = parameters[source]
    return model


def stream_model(
    config: PreTrainedConfig, tensors: WeightStore, tied: Mapping[str, str], put: Mapping[str, Array]
) -> PreTrainedModel:
    """Build a model whose modules read their parameters from disk when they run, and drop them afterwards.

    The same code runs as for the whole model, so the results are the same. Every step reads every parameter,
    which is unavoidable for a model that is larger than memory. From an embedding, only the rows of the
    step's tokens are read; a layer of more than BLOCK_BYTES, such as the output head, is computed in blocks
    of outputs. A parameter that another module uses, as mixers use the weights of their convolutions, is read
    at that time.

    Args:
        tensors: Every stored parameter and persistent buffer, by name.
        tied: Name of an absent parameter -> name of the stored parameter whose values it shares.
        put: Values that replace stored ones, by name.

    Raises:
        UnsupportedError: transformers cannot build the model.
    """
    import torch

    model = build_hollow(config)
    fill_buffers(model, tensors)

    def read(name: str) -> torch.nn.Parameter:
        source = tied.get(name, name)
        given = next((key for key in (name, source) if key in put), None)
        if given is None:
            return _parameter(_read(tensors, source))
        return _parameter(torch.from_numpy(np.require(put[given], np.float32, ["C", "W"])))

    def rows(name: str) -> StoredRows | None:
        """Return the stored values of a parameter, unless `put` replaces them."""
        source = tied.get(name, name)
        info = tensors.infos().get(source)
        return None if info is None or {name, source} & set(put) else StoredRows(tensors, info)

    for name, module in model.named_modules():
        names, kind = _parameter_names(module), type(module)
        readers = {own: partial(read, _join(name, own)) for own in names}
        if readers:
            _read_when_used(module, readers)
        stored = rows(_join(name, "weight")) if names == ["weight"] else None
        if kind is torch.nn.Embedding and stored is not None:
            _compute_by(module, partial(_embed, stored))
        elif kind is torch.nn.Linear and stored is not None and _is_wide(stored):
            _compute_by(module, partial(_project, stored))
        elif names:
            _read_when_run(module, readers)
    return model


def _compute_by(module: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module.forward = forward


def _embed(weight: StoredRows, ids: torch.Tensor) -> torch.Tensor:
    """Gather the rows of `weight` for `ids` of any shape, float32."""
    import torch

    tokens, places = torch.unique(ids, return_inverse=True)
    read = [weight.rows(int(token), int(token) + 1) for token in tokens]
    return torch.from_numpy(np.concatenate(read).astype(np.float32))[places]


def _project(weight: StoredRows, states: torch.Tensor) -> torch.Tensor:
    """Multiply `states` (..., inputs) by `weight` (outputs, inputs) transposed, in blocks of outputs."""
    import torch

    outputs, inputs = weight.shape
    product = states.new_empty((*states.shape[:-1], outputs))
    step = max(1, BLOCK_BYTES // (4 * inputs))
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        block = torch.from_numpy(weight.rows(start, stop).astype(np.float32))
        product[..., start:stop] = torch.nn.functional.linear(states, block)
    return product


def _is_wide(weight: StoredRows) -> bool:
    return 4 * int(np.prod(weight.shape)) > BLOCK_BYTES


def _read_when_used(module: Any, readers: Mapping[str, Callable[[], torch.nn.Parameter]]) -> None:
    """Read a parameter whenever it is used while it is not loaded.

    Otherwise another module would compute with a tensor without data. Some operators of torch accept that: a
    convolution with such weights returns whatever was in memory.
    """
    kind: Any = type(module)
    module.__dict__["_readers"] = readers
    module.__class__ = _reading_class(kind)


@cache
def _reading_class(kind: Any) -> Any:
    """Return the subclass of a module's class that reads the parameters that are not loaded."""

    def read(module: Any, name: str) -> Any:
        value = kind.__getattr__(module, name)
        reader = module.__dict__["_readers"].get(name)
        return reader() if reader is not None and value.is_meta else value

    return type(kind.__name__, (kind,), {"__getattr__": read, "__module__": kind.__module__})


def _read_when_run(module: Any, readers: Mapping[str, Callable[[], torch.nn.Parameter]]) -> None:
    hollow = {own: module._parameters[own] for own in readers}

    def load(module: Any, _: Any) -> None:
        for own, reader in readers.items():
            module._parameters[own] = reader()

    def drop(module: Any, _: Any, __: Any) -> None:
        module._parameters.update(hollow)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop, always_call=True)


def fill_buffers(model: PreTrainedModel, tensors: WeightStore) -> None:
    """Replace the initial values of persistent buffers by the values in the files."""
    stored = tensors.infos()
    for name, module in model.named_modules():
        for own, buffer in list(module.named_buffers(recurse=False)):
            if _join(name, own) in stored:
                setattr(module, own, _read(tensors, _join(name, own)).to(buffer.dtype))


def _read(tensors: WeightStore, name: str) -> torch.Tensor:
    """Read a tensor in float32, in parts, into memory that torch has aligned for its kernels."""
    import torch

    info = tensors.infos().get(name)
    if info is None:
        raise CheckpointError(
            f"the files lack {name}, which the model has",
            hint="config and weights must belong to the same causal language model",
        )
    values = torch.empty(info.shape, dtype=torch.float32)
    view = np.atleast_1d(values.numpy())
    for start, stop in row_chunks(StoredRows(tensors, info)):
        view[start:stop] = tensors.read(name, start, stop)
    return values


def _parameter(values: torch.Tensor) -> torch.nn.Parameter:
    import torch

    return torch.nn.Parameter(values, requires_grad=False)


def _parameter_names(module: Any) -> list[str]:
    return [own for own, value in module._parameters.items() if value is not None]


def _join(module: str, own: str) -> str:
    return f"{module}.{own}" if module else own
