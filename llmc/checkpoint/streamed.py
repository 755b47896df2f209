"""The original PyTorch model with the parameters of one module in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.checkpoint.skeleton import build_hollow
from llmc.graph.weights import Array, WeightStore

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def stream_model(
    config: PreTrainedConfig, tensors: WeightStore, tied: Mapping[str, str], put: Mapping[str, Array]
) -> PreTrainedModel:
    """A model whose modules read their parameters from disk when they run, and drop them afterwards.

    Its numbers are those of the model that was loaded whole: the same code computes them. A step costs
    reading every parameter, which is what a model that is larger than memory costs in any case. The weights
    of an embedding are read whole; what a module does with another module's parameters fails, since they
    are not there.

    Args:
        tensors: Every stored parameter and persistent buffer, by name.
        tied: Absent parameter -> stored parameter whose values it shares.
        put: Values in the place of stored ones, by name.

    Raises:
        UnsupportedError: transformers cannot build it.
    """
    import torch

    model = build_hollow(config)
    stored = tensors.infos()

    def read(name: str) -> torch.nn.Parameter:
        source = tied.get(name, name)
        if name in put or source in put:
            array = put[name] if name in put else put[source]
        else:
            array = tensors.read(source)
        values = torch.from_numpy(np.array(array, np.float32))
        return torch.nn.Parameter(values, requires_grad=False)

    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for buffer, held in list(module.named_buffers(recurse=False)):
            if prefix + buffer in stored:
                setattr(module, buffer, read(prefix + buffer).data.to(held.dtype))
        hollow = {own: value for own, value in module._parameters.items() if value is not None}
        if not hollow:
            continue

        def load(module: Any, _: Any, prefix: str = prefix, names: tuple[str, ...] = tuple(hollow)) -> None:
            for own in names:
                module._parameters[own] = read(prefix + own)

        def drop(module: Any, _: Any, __: Any, hollow: dict[str, Any] = hollow) -> None:
            module._parameters.update(hollow)

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop, always_call=True)
    return model
