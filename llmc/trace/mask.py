"""Interpret mask rules, transformers' functions of positions, as settings of an attention operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class MaskRule:
    """The rule requested from transformers' mask interface; models pass it on as if it were the mask.

    Args:
        function: Function of (batch, head, query position, key position), true where the key is visible.
        local_size: The sliding window that the caller states; 0 for none.
    """

    function: Callable[..., Any]
    local_size: int

    def __getitem__(self, _: Any) -> MaskRule:
        """Return the rule itself; models slice masks to the length of their keys, but a rule has none."""
        return self

    def window(self, stated: int = 0) -> int:
        """Return the sliding window; 0 for a plain causal mask.

        Args:
            stated: The window with which the attention was called; 0 for none.

        Raises:
            UnsupportedError: The rule is neither causal nor a window, or depends on more than positions.
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
    """Return the sliding window of a mask rule (0 for plain causal), or None if it is neither.

    Args:
        rule: transformers' mask function of (batch, head, query position, key position).
        reach: Largest window that can occur.
    """
    import torch

    count = reach + 2
    keys = torch.arange(count)
    last = torch.tensor(count - 1)
    zero = torch.tensor(0)
    visible = rule(zero, zero, last, keys).broadcast_to(keys.shape)
    window = int(visible.sum())
    probes = sorted({0, 1, count // 2, max(window - 1, 0), min(window, count - 1), count - 1})
    for position in probes:
        expected = (keys <= position) & (keys > position - window)
        actual = rule(zero, zero, torch.tensor(position), keys).broadcast_to(keys.shape)
        if not torch.equal(actual, expected):
            return None
    return 0 if window == count else window
