"""Interpret mask rules, transformers' functions of positions, as settings of an attention operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, ClassVar

from llmc.errors import UnsupportedError

#: Number of positions that are probed at least, so that a window or chunk need not be stated to be found.
_LEAST_POSITIONS = 1 << 15
#: A number of padded slots at the start of a row, by which rules that count from there have to shift.
_SHIFT = 3


@dataclass(frozen=True)
class Visible:
    """The keys that a causal mask leaves visible.

    Args:
        window: Number of most recent positions; 0 for all.
        chunk: Number of positions of a chunk, of which a query sees only its own; 0 if there are none.
    """

    window: int = 0
    chunk: int = 0

    @property
    def furthest(self) -> int:
        """The largest number of most recent positions that a query sees; 0 for all."""
        return self.window or self.chunk

    def __str__(self) -> str:
        if self.chunk:
            return f"chunks of {self.chunk}"
        return f"window {self.window}" if self.window else "no window"


@dataclass(frozen=True, eq=False)
class MaskRule:
    """The rule requested from transformers' mask interface; models pass it on as if it were the mask.

    Args:
        function: Function of (batch, head, query position, key position), true where the key is visible.
        local_size: The sliding window or chunk that the caller states; 0 for none.
    """

    function: Callable[..., Any]
    local_size: int

    #: transformers asks prepared masks for it, which have the dimensions batch, head, query and key.
    ndim: ClassVar[int] = 4

    def __getitem__(self, _: Any) -> MaskRule:
        """Return the rule itself; models slice masks to the length of their keys, but a rule has none."""
        return self

    def visible(self, stated: int = 0) -> Visible:
        """Return which keys the rule leaves visible.

        Args:
            stated: The window with which the attention was called; 0 for none.

        Raises:
            UnsupportedError: The rule is neither causal, a window nor chunks, or depends on more than
                positions.
        """
        name = getattr(self.function, "__qualname__", str(self.function))
        positions = max(_LEAST_POSITIONS, 4 * (max(self.local_size, stated) + 1))
        try:
            found = classify_mask(self.function, positions)
        except Exception as error:
            raise UnsupportedError(f"mask rule {name} depends on more than positions") from error
        if found is None:
            raise UnsupportedError(f"mask rule {name} is neither causal nor a sliding window nor chunks")
        return found


def classify_mask(rule: Callable[..., Any], count: int) -> Visible | None:
    """Return which keys a mask rule leaves visible; None if it is neither causal, a window nor chunks.

    Rules may count positions from the first real token of each row, in a tensor (batch,) that tracing knows
    only by its shape. They are probed with rows that begin at slot 0, and with rows that begin later.

    Args:
        rule: transformers' mask function of (batch, head, query position, key position).
        count: Number of positions to probe, more than twice the largest window or chunk that can occur.
    """
    found = _classify(_begun_at(rule, 0), 0, count)
    moved = _begun_at(rule, _SHIFT)
    return found if moved is rule or found == _classify(moved, _SHIFT, count) else None


def _classify(rule: Callable[..., Any], first: int, count: int) -> Visible | None:
    """Classify a rule for rows whose first real token is in slot `first`."""
    import torch

    keys = torch.arange(first, first + count)
    zero = torch.tensor(0)
    sees_first = rule(zero, zero, keys, torch.tensor(first)).broadcast_to(keys.shape)
    edge = count if bool(sees_first.all()) else int(sees_first.int().argmin())
    if not edge:
        return None
    near = (n * edge + d for n in range(4) for d in (-1, 0, 1, edge // 2))
    probes = sorted({n for n in (*near, 1, count // 2, count - 1) if 0 <= n < count})
    candidates = [Visible()] if edge == count else [Visible(window=edge), Visible(chunk=edge)]
    for position in probes:
        actual = rule(zero, zero, torch.tensor(first + position), keys).broadcast_to(keys.shape)
        candidates = [c for c in candidates if torch.equal(actual, _expected(c, position, keys - first))]
    return candidates[0] if candidates else None


def _expected(visible: Visible, position: int, keys: Any) -> Any:
    """Return which keys a query at `position` sees."""
    seen = keys <= position
    if visible.window:
        seen &= keys > position - visible.window
    if visible.chunk:
        seen &= keys // visible.chunk == position // visible.chunk
    return seen


def _begun_at(rule: Any, first: int) -> Any:
    """Return a rule whose rows begin at slot `first`: with that number in tensors (batch,) without values.

    Returns `rule` itself if no such tensor is in its closure.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(rule, FakeTensor) and rule.ndim == 1 and not rule.is_floating_point():
        return torch.full((1,), first, dtype=rule.dtype)
    if isinstance(rule, tuple):
        parts = [_begun_at(part, first) for part in rule]
        return rule if all(a is b for a, b in zip(parts, rule, strict=True)) else tuple(parts)
    if not isinstance(rule, FunctionType) or not rule.__closure__:
        return rule
    held = [cell.cell_contents for cell in rule.__closure__]
    begun = [_begun_at(value, first) for value in held]
    if all(a is b for a, b in zip(begun, held, strict=True)):
        return rule
    cells = tuple(map(CellType, begun))
    return FunctionType(rule.__code__, rule.__globals__, rule.__name__, rule.__defaults__, cells)
