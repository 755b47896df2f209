"""Build what one rank has of a model, with the tensor-parallel layers of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.checkpoint.reference import fill_buffers
from llmc.checkpoint.skeleton import build_hollow
from llmc.errors import CheckpointError
from llmc.graph.weights import StoredRows, WeightStore, row_chunks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def fill_rank(
    config: PreTrainedConfig, tensors: WeightStore, tied: Mapping[str, str], ranks: int
) -> PreTrainedModel:
    """Build the part of a model that this process's rank has, float32 with eager attention.

    A process group of `ranks` processes must exist. transformers' own layers exchange activations between
    them. Only the rank's box of each parameter is kept, read some rows at a time.

    Args:
        tensors: Every stored parameter and persistent buffer with its whole shape; it may have zeros outside
            of the rank's boxes.
        tied: Name of an absent parameter -> name of the stored one whose values it shares.

    Raises:
        CheckpointError: A parameter is missing from the files.
        UnsupportedError: transformers cannot build the model.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model = build_hollow(config)
    fill_buffers(model, tensors)
    for module in model.modules():  # a layer is found by the name of its own parameter
        for own, value in module._parameters.items():
            if value is not None:
                module._parameters[own] = torch.nn.Parameter(torch.empty_like(value), requires_grad=False)
    apply_tensor_parallelism(model, init_device_mesh("cpu", (ranks,)), _expand(model))
    filled: dict[tuple[Any, ...], torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        for own, value in module._parameters.items():
            if value is None:
                continue
            full = f"{name}.{own}" if name else own
            source = tied.get(full, full)
            key = (source, getattr(value, "placements", None))
            if key not in filled:
                filled[key] = torch.nn.Parameter(_local(tensors, source, value), requires_grad=False)
            module._parameters[own] = filled[key]
    return model


def _expand(model: PreTrainedModel) -> dict[str, str]:
    """Return the plan with the layers' numbers: first the parameters of a module, then the module."""
    plan, found = model.tp_plan, {}
    for name, module in model.named_modules():
        style = plan.get(_LAYER_NUMBER.sub(".*", name))
        if style is not None:
            found.update({f"{name}.{own}": style for own, _ in module.named_parameters(recurse=False)})
            found[name] = style
    return found


def _local(tensors: WeightStore, name: str, hollow: Any) -> Any:
    """Read this rank's box of a parameter, in the form that `hollow` has."""
    import torch
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    info = tensors.infos().get(name)
    if info is None:
        raise CheckpointError(
            f"the files lack {name}, which the model has",
            hint="config and weights must belong to the same causal language model",
        )
    split = isinstance(hollow, DTensor)
    shape, start = tuple(info.shape), (0,) * len(info.shape)
    if split:
        size, start = compute_local_shape_and_global_offset(shape, hollow.device_mesh, hollow.placements)
        shape = tuple(size)
    values = torch.empty(shape, dtype=torch.float32)
    view = np.atleast_1d(values.numpy())
    low, high = (start[0], start[0] + shape[0]) if shape else (0, 1)
    columns = tuple(slice(first, first + count) for first, count in zip(start[1:], shape[1:], strict=True))
    for first, last in row_chunks(StoredRows(tensors, info)):
        first, last = max(first, low), min(last, high)
        if first < last:
            rows = np.atleast_1d(tensors.read(name, first, last))
            view[first - low : last - low] = rows[:, *columns] if columns else rows
    if not split:
        return values
    return DTensor.from_local(
        values,
        hollow.device_mesh,
        hollow.placements,
        run_check=False,
        shape=hollow.shape,
        stride=hollow.stride(),
    )
