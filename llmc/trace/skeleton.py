"""Build a model's own code without weights: parameters are fake tensors, buffers are real."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmc.architecture import auto_class, building
from llmc.errors import UnsupportedError
from llmc.trace.capture import EAGER, NAME, SDPA, register_interfaces
from llmc.trace.experts import read_gates
from llmc.trace.idle import drop_idle_layers

if TYPE_CHECKING:
    import torch


def build_fake_model(config: Any, dtype: torch.dtype, *, captured: bool) -> torch.nn.Module:
    """Build the causal LM of `config` in evaluation mode, without memory for its parameters.

    Its attention is the capturing hook if the model supports exchangeable attention; otherwise it is torch's
    scaled dot product attention (see `llmc.trace.capture.intercepting_sdpa`).

    Args:
        config: A transformers configuration; not changed.
        dtype: Type of the parameters.
        captured: Whether to capture attention; otherwise the model's own attention runs in plain operators.

    Raises:
        UnsupportedError: transformers has no causal LM for the configuration, or it reads more than text.
    """
    import copy

    import torch
    from accelerate import init_empty_weights
    from torch._subclasses.fake_tensor import FakeTensorMode

    register_interfaces()
    config = copy.deepcopy(config)
    config._experts_implementation = NAME
    refusals: list[Exception] = []
    make: Callable[..., Any] = auto_class(config).from_config
    model = None
    for attention in (NAME, SDPA) if captured else (EAGER,):
        try:
            with init_empty_weights(include_buffers=False), building():
                model = make(config, attn_implementation=attention, dtype=dtype)
            break
        except (KeyError, ValueError) as error:
            refusals.append(error)
    if model is None:
        raise UnsupportedError(
            "transformers cannot build a causal LM with exchangeable attention from"
            f" {type(config).__name__}: {_first_line(refusals[-1])}",
            hint="its attention goes neither through transformers' attention interface nor through torch's "
            "scaled dot product attention",
        ) from refusals[-1]
    model.eval()
    model.tie_weights()
    read_gates(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                with mode:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    fakes[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = fakes[id(parameter)]
    drop_idle_layers(model)
    return model  # type: ignore[no-any-return]


def parameter_aliases(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """Return all names of every parameter that has several, under each of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {n: tuple(group) for group in names.values() if len(group) > 1 for n in group}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0]
