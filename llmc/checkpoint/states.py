"""Refuse models that keep what they know of earlier tokens in nothing that tracing looks into.

It looks into a `Cache` of transformers, and into the tensors that a step leaves in a module or in a cache
class of the model's own.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from typing import TYPE_CHECKING, Any

from llmc.errors import UnsupportedError, number_ranges

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HINT = "llmc compiles models whose keys, values and states are in the Cache of transformers' generate"
#: Names of arguments that carry a state from step to step.
_STATE = re.compile(r"(?!output_|encoder_|use_)(past_\w+|(\w+_)?(cache|states?|mems)(_params)?)")


def refuse_own_state(model: PreTrainedModel) -> None:
    """Check that the model keeps its state in a `Cache` of transformers, in layers that transformers defines.

    Raises:
        UnsupportedError: It has another kind of state, or none; the message names the class and the layers.
    """
    _refuse_other_arguments(model)
    _refuse_own_layers(model)


def _refuse_other_arguments(model: PreTrainedModel) -> None:
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    if "cache" in parameters:
        if (kind := _own_kind(parameters["cache"].annotation)) is not None:
            raise UnsupportedError(f"{name} keeps its state in a {kind.__name__} of its own", hint=_HINT)
        return
    own = [key for key in parameters if _STATE.fullmatch(key)]
    if own:
        raise UnsupportedError(f"{name} keeps a state of its own ({', '.join(own)})", hint=_HINT)
    raise UnsupportedError(f"{name} keeps nothing between steps: it has no KV cache", hint=_HINT)


def _own_kind(annotation: Any) -> type | None:
    """Return the class of a cache argument that holds another thing than a `Cache` of transformers.

    Models annotate the argument in many ways, such as `Cache | None`, a list or a tuple of tensors (from
    before transformers had the class) or not at all. A dictionary or another class holds what only the model
    knows.
    """
    from transformers import Cache

    for option in typing.get_args(annotation) or (annotation,):
        kind = typing.get_origin(option) or option
        if not isinstance(kind, type) or kind in (list, tuple, types.NoneType, inspect.Parameter.empty):
            continue
        if not issubclass(kind, Cache):
            return kind
    return None


def _refuse_own_layers(model: PreTrainedModel) -> None:
    from transformers import cache_utils

    if not hasattr(model.config.get_text_config(decoder=True), "num_hidden_layers"):
        return  # transformers makes a cache without layers, which appear as they are used
    by_class: dict[type, list[int]] = {}
    for index, layer in enumerate(cache_utils.DynamicCache(config=model.config).layers):
        by_class.setdefault(type(layer), []).append(index)
    for kind, indices in by_class.items():
        if kind.__module__ != cache_utils.__name__:
            raise UnsupportedError(
                f"{type(model).__name__} keeps the state of layers {number_ranges(indices)} in a cache class "
                f"of its own, {kind.__name__}",
                hint=_HINT,
            )
