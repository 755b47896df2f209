"""Explain why a model's own code cannot be traced, by the module and the line that fails."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmc.architecture import language_model
from llmc.errors import UnsupportedError, count_names, failing_line
from llmc.trace.capture import STATES_HINT, UnknownStateError

if TYPE_CHECKING:
    import torch


def root_cause(error: BaseException) -> BaseException:
    """Return the first of a chain of exceptions that were raised from each other."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def watch_states(model: torch.nn.Module) -> list[str]:
    """Return a list that gets the attributes of modules in which the next run of `model` leaves a tensor."""
    before = {name for name, _ in _tensor_attributes(model)}
    kept: list[str] = []

    def look(*_: Any) -> None:
        kept.extend(f"{name} ({kind})" for name, kind in _tensor_attributes(model) if name not in before)

    model.register_forward_hook(look, always_call=True)
    return kept


def check_cache_class(model: torch.nn.Module) -> None:
    """Check that the model's code defines no cache of its own.

    Raises:
        UnknownStateError: It does.
    """
    from transformers import Cache

    for part in (model, language_model(model)):
        module = sys.modules[type(part).__module__]
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, Cache) and kind.__module__ == module.__name__:
                raise UnknownStateError(
                    f"{type(model).__name__} keeps its state in a cache class of its own, {name}",
                    hint=STATES_HINT,
                )


def explain_failure(model: torch.nn.Module, cause: BaseException, kept: Sequence[str]) -> UnsupportedError:
    """Return the refusal of a model whose code failed while it was traced.

    Args:
        model: The model that was traced.
        cause: The root of the exceptions raised.
        kept: The attributes in which the model left tensors; see `watch_states`.
    """
    from torch._dynamo.exc import UserError
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    name = type(model).__name__
    if kept:
        return UnknownStateError(
            f"{name} keeps a state in {count_names(kept)}, outside of the cache",
            hint=STATES_HINT,
        )
    where = _place(model, cause)
    message = (str(cause).strip().splitlines() or ["it gives no reason"])[0]
    fixed = re.match(r"Constraints violated \(([\w, ]+)\)", message)
    if isinstance(cause, GuardOnDataDependentSymNode):
        why = f"its code depends on the values of a step{where}"
    elif isinstance(cause, UserError) and fixed:
        why = f"its code is made for one size of {fixed[1].replace(', ', ' and ')}"
    else:
        why = f"its code fails{where}: {message}"
    return UnsupportedError(f"{name} cannot be traced: {why}", hint="run with --debug for the full traceback")


def check_splits(model: torch.nn.Module, program: torch.export.ExportedProgram) -> None:
    """Refuse splits by sizes that the step itself computes, which ONNX's Split cannot express.

    Raises:
        UnsupportedError: The program has such a split.
    """
    import torch

    split = (torch.ops.aten.split_with_sizes.default, torch.ops.aten.split_with_sizes_copy.default)
    for node in program.graph.nodes:
        if node.target in split and not all(isinstance(size, int) for size in node.args[1]):
            inside = list(node.meta.get("nn_module_stack", {}).values())
            where = f" in {inside[-1][0].removeprefix('model.')}" if inside else ""
            raise UnsupportedError(
                f"{type(model).__name__} cannot be traced: its code splits tokens{where} into parts whose "
                "sizes depend on the values of a step",
                hint="experts can be compiled if transformers' experts interface calls them",
            )


def _tensor_attributes(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the name and class of every attribute with a tensor, besides parameters and buffers."""
    import torch

    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{name}.{key}", type(module).__name__


def _place(model: torch.nn.Module, cause: BaseException) -> str:
    """Return the module of the model and the line of its code at which `cause` was raised; may be empty."""
    import torch

    names = {id(module): name for name, module in model.named_modules()}
    inside = ""
    step = cause.__traceback__
    while step is not None:
        own = step.tb_frame.f_locals.get("self")
        if isinstance(own, torch.nn.Module) and names.get(id(own)):
            inside = f" in {names[id(own)]} ({type(own).__name__})"
        step = step.tb_next
    return inside + failing_line(cause, "transformers")
