"""Mask rules: transformers' functions of positions, read as what an attention operator can say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class MaskRule:
    """What transformers' mask interface was asked for; models hand it on as if it were the mask.

    Args:
        function: Of (batch, head, query position, key position), true where the key is visible.
        local_size: The sliding window that the caller states, 0 for none.
    """

    function: Callable[..., Any]
    local_size: int

    def __getitem__(self, _: Any) -> MaskRule:
        """Models cut masks to the length of their keys, which a rule does not need."""
        return self

    def window(self, stated: int = 0) -> int:
        """The sliding window, 0 for plain causal.

        Args:
            stated: The window that the attention was called with, 0 for none.

        Raises:
            UnsupportedError: The rule is neither, or depends on more than positions.
        """
        name = getattr(self.function, "__qualname__", str(self.function))
        try:
            window = classify_mask(self.function, max(self.local_size, stated) + 1)
        except Exception as error:
            raise UnsupportedError(f"mask rule {name} depends on more than positions") from error
        if window is None:
            raise UnsupportedError(f"mask rule {name} is neither causal nor a sliding window")
        return window


def classify_mask(rule: Callable[..., Any], reach: int) -> int | None:
    """The sliding window of a mask rule (0 for plain causal), or None if it is neither.

    Args:
        rule: transformers' mask function of (batch, head, query position, key position).
        reach: Largest window that can occur.
    """
    import torch

    count = reach + 2
    keys = torch.arange(count)
    last = torch.tensor(count - 1)
    zero = torch.tensor(0)
    seen = rule(zero, zero, last, keys).broadcast_to(keys.shape)
    window = int(seen.sum())
    probes = sorted({0, 1, count // 2, max(window - 1, 0), min(window, count - 1), count - 1})
    for position in probes:
        expected = (keys <= position) & (keys > position - window)
        got = rule(zero, zero, torch.tensor(position), keys).broadcast_to(keys.shape)
        if not torch.equal(got, expected):
            return None
    return 0 if window == count else window
