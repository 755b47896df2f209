"""The original's own attention in blocks of queries, which bounds the memory of a long prompt."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

#: Most bytes of float32 scores that one layer may make at a time.
SCORE_BYTES = 48 << 20
#: Most bytes of a mask that is made as a whole.
MASK_BYTES = 1 << 30

_NAME = "llmc_rows"


@dataclass(frozen=True)
class _Mask:
    """A mask whose rows are made when they are read, of the arguments of transformers' mask interface."""

    arguments: dict[str, Any]

    def rows(self, start: int, stop: int) -> Any:
        """(batch, 1, stop - start, keys) float."""
        from transformers.masking_utils import eager_mask

        offset = self.arguments.get("q_offset", 0) + start
        return eager_mask(**self.arguments | {"q_length": stop - start, "q_offset": offset})


@contextmanager
def attention_by_rows(model: Any, queries: int, keys: int) -> Iterator[None]:
    """Within this context eager attention of `model` computes as many queries at a time as there is room for.

    Every query gets the numbers that it has in one block. Models whose attention does not go through
    transformers' attention interface are left as they are.

    Args:
        queries: Tokens of the step.
        keys: Tokens that they see, at most.
    """
    heads = getattr(model.config.get_text_config(decoder=True), "num_attention_heads", 1)
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
    """The mask as a tensor, or by rows where that would be too large."""
    from transformers.masking_utils import eager_mask

    elements = arguments["batch_size"] * arguments["q_length"] * arguments["kv_length"]
    return eager_mask(**arguments) if 4 * elements <= MASK_BYTES else _Mask(arguments)


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **rest: Any) -> Any:
    """(output, None) of the eager attention of the module's own file."""
    import torch

    eager = sys.modules[type(module).__module__].eager_attention_forward
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    rows = max(1, SCORE_BYTES // (4 * heads * keys * query.shape[0]))
    blocks = []
    for start in range(0, queries, rows):
        stop, mask = min(start + rows, queries), attention_mask
        if isinstance(mask, _Mask):
            mask = mask.rows(start, stop)
        elif mask is not None and mask.shape[-2] == queries:
            mask = mask[..., start:stop, :]
        blocks.append(eager(module, query[:, :, start:stop], key, value, mask, **rest)[0])
    return torch.cat(blocks, dim=1), None
