"""Leave out the decoder layers that text alone does not run, such as cross-attention to an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmc.errors import UnsupportedError, number_ranges
from llmc.trace.capture import capturing
from llmc.trace.stamp import find_layers

_DECLARED = "cross_attention_layers"


def drop_idle_layers(model: Any) -> None:
    """Remove the layers that the model's own code skips on text alone, if its config declares any.

    The layers that stay keep the names of their weights, and address the cache by their new positions.

    Args:
        model: A model without weights, which nothing has traced yet.

    Raises:
        UnsupportedError: A layer that attends to an image or another model's states runs on text alone.
    """
    text = model.config.get_text_config(decoder=True)
    declared = getattr(text, _DECLARED, None)
    if not declared:
        return
    stack = find_layers(model, text, stamp=False)
    ran = _run_without_layers(model, stack.names)
    if needed := sorted(set(declared) & ran):
        raise UnsupportedError(
            f"{type(model).__name__} has cross-attention in layers {number_ranges(needed)}: besides "
            "the text, it reads an image or another model's states",
            hint="llmc compiles decoders that read only text; use the text-only model of the family",
        )
    layers = model.get_submodule(stack.names[0].rpartition(".")[0])
    kept = [key for key in list(layers._modules) if int(key) in ran]
    layers._modules = {key: layers._modules[key] for key in kept}
    for position, key in enumerate(kept):
        for module in layers._modules[key].modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position
    for holder in (text, model.config, *model.modules()):
        if hasattr(holder, _DECLARED):
            setattr(holder, _DECLARED, [])


def idle_note(config: Any, names: Sequence[str]) -> str | None:
    """Say in a sentence which layers are left out; None if there are none.

    Args:
        names: Qualified names of the decoder layers that stayed.
    """
    text = config.get_text_config(decoder=True)
    kept = {int(name.rpartition(".")[2]) for name in names}
    idle = [n for n in getattr(text, _DECLARED, None) or () if n < text.num_hidden_layers and n not in kept]
    if not idle:
        return None
    which = f"{'layer' if len(idle) == 1 else 'layers'} {number_ranges(idle)}"
    return f"text only: the model skips {which}, which would attend to an image, and so does the artifact"


def _run_without_layers(model: Any, names: tuple[str, ...]) -> set[int]:
    """Run a step on text alone whose layers return what they get; return the positions of those that ran."""
    import torch
    from transformers import DynamicCache

    ran: set[int] = set()

    def passing(position: int) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            ran.add(position)
            return hidden_states

        return forward

    layers = [model.get_submodule(name) for name in names]
    for position, layer in enumerate(layers):
        layer.forward = passing(position)
    mode = next(model.parameters()).fake_mode
    try:
        with capturing(), torch.no_grad(), mode:
            ids = torch.zeros(1, 3, dtype=torch.long)
            model(input_ids=ids, attention_mask=torch.ones_like(ids), cache=DynamicCache(config=model.config))
    finally:
        for layer in layers:
            del layer.forward
    return ran
