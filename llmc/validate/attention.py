"""Compute the original's own attention in blocks of queries, which bounds the memory of a long prompt."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmc.architecture import values_by_layer

#: Maximum bytes of float32 scores that one layer may compute at a time.
SCORE_BYTES = 48 << 20
#: Maximum bytes of a mask that is built as a whole.
MASK_BYTES = 1 << 30

_NAME = "llmc_rows"


@dataclass(frozen=True)
class _Mask:
    """The mask of a step, whose rows are computed on demand by transformers' mask interface."""

    arguments: dict[str, Any]

    def rows(self, start: int, stop: int) -> Any:
        """Return rows start:stop, (batch, 1, stop - start, keys) float."""
        from transformers.masking_utils import eager_mask

        offset = self.arguments.get("q_offset", 0) + start
        return eager_mask(**self.arguments | {"q_length": stop - start, "q_offset": offset})


@contextmanager
def attention_by_rows(model: Any, queries: int, keys: int) -> Iterator[None]:
    """Let eager attention of `model` compute, within this context, only as many queries at a time as fit.

    Every query gets the same result as in one block. Models whose attention does not go through
    transformers' attention interface are left unchanged.

    Args:
        queries: Number of tokens of the step.
        keys: Maximum number of tokens that they attend to.
    """
    heads = max(int(heads or 1) for heads in values_by_layer(model.config, "num_attention_heads"))
    exchangeable = model.config._attn_implementation == "eager" and model._can_set_attn_implementation()
    if 4 * heads * queries * keys <= SCORE_BYTES or not exchangeable:
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _make_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("eager")


def _make_mask(**arguments: Any) -> Any:
    """Return the mask as a tensor, or as a `_Mask` where the tensor would be too large."""
    from transformers.masking_utils import eager_mask

    elements = arguments["batch_size"] * arguments["q_length"] * arguments["kv_length"]
    return eager_mask(**arguments) if 4 * elements <= MASK_BYTES else _Mask(arguments)


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **rest: Any) -> Any:
    """Return (output, None) of the module's own eager attention, over the keys that each block sees."""
    import torch

    attend = _fused if _is_plain(module, rest) else _eager_of(module)
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    rows = max(1, SCORE_BYTES // (4 * heads * keys * query.shape[0]))
    blocks = []
    for start in range(0, queries, rows):
        stop, mask = min(start + rows, queries), attention_mask
        if isinstance(mask, _Mask):
            mask = mask.rows(start, stop)
        elif mask is not None and mask.shape[-2] == queries:
            mask = mask[..., start:stop, :]
        seen = _seen(mask, keys)
        mask = None if mask is None else mask[..., seen]
        blocks.append(
            attend(module, query[:, :, start:stop], key[:, :, seen], value[:, :, seen], mask, **rest)[0]
        )
    return torch.cat(blocks, dim=1), None


def _seen(mask: Any, keys: int) -> slice:
    """Return the range of keys that any query of a block sees; it is all of them without a mask.

    A key outside of it has a weight of exactly zero, since exp of the least float32 is zero.
    """
    import torch

    if mask is None or mask.shape[-1] != keys:
        return slice(0, keys)
    seen = (mask > torch.finfo(mask.dtype).min / 2).flatten(0, -2).any(dim=0).nonzero()
    return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, keys)


def _eager_of(module: Any) -> Callable[..., Any]:
    forward: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return forward


def _is_plain(module: Any, rest: dict[str, Any]) -> bool:
    """Whether a module attends by code of transformers' that PyTorch's fused attention equals."""
    from transformers.models.gemma3 import modeling_gemma3
    from transformers.models.llama import modeling_llama

    own = _code(_eager_of(module))
    # gemma's has a scale of its own if none is given, and a cap of scores if one is.
    plain = own in {_code(known.eager_attention_forward) for known in (modeling_llama, modeling_gemma3)}
    absent = all(rest.get(name) is None for name in ("softcap", "s_aux", "position_bias"))
    return plain and absent and rest.get("scaling") is not None


def _code(function: Callable[..., Any]) -> tuple[Any, ...]:
    code = function.__code__
    return code.co_code, code.co_consts, code.co_names


def _fused(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
    """Return (output (batch, queries, heads, width), None) of llama's eager attention without its scores."""
    import torch

    groups = module.num_key_value_groups
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=rest["scaling"]
    )
    return output.transpose(1, 2).contiguous(), None
