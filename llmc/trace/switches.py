"""Find the lengths beyond which a model computes differently, as far as its own code shows.

A dynamic rotary embedding (dynamic NTK scaling) computes its frequencies from the longest step so far, once
that exceeds the positions of the configuration. Up to that length the frequencies are constant, and a trace
fixes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_DYNAMIC = "dynamic"


def hold_frequencies(model: torch.nn.Module) -> int | None:
    """Make every dynamic rotary embedding keep its initial frequencies.

    Returns:
        The largest length up to which the model itself keeps them; None without such an embedding.
    """
    lengths = []
    module: Any
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind if isinstance(kind, dict) else {None: kind}
        if not any(isinstance(k, str) and _DYNAMIC in k for k in kinds.values()):
            continue
        fixed = {layer: "default" if k and _DYNAMIC in k else k for layer, k in kinds.items()}
        module.rope_type = fixed if isinstance(kind, dict) else fixed[None]
        lengths.append(int(module.max_seq_len_cached))
    return min(lengths, default=None)


def restart_length(model: Any, switches: Sequence[int]) -> int | None:
    """Return the first switch at which `generate` drops the KV cache and recomputes all tokens; None if none.

    The model's own `prepare_inputs_for_generation` decides, given a cache of as many tokens.
    """
    import torch
    from transformers import DynamicCache

    for at in sorted(switches):
        cache = DynamicCache()
        keys = torch.zeros(1, 1, at, 1)
        cache.update(keys, keys, 0)
        tokens = torch.zeros(1, at + 1, dtype=torch.long)
        prepared = model.prepare_inputs_for_generation(
            tokens,
            cache=cache,
            attention_mask=torch.ones_like(tokens),
            use_cache=True,
            next_sequence_length=1,
        )
        if prepared.get("cache") is None:
            return at
    return None
