"""Record whether a layer's code computes with the layer's index, which makes layers differ."""

from __future__ import annotations

from typing import Any

#: Operations that compare the index.
COMPARISONS = {"<", "<=", ">", ">="}


class LayerIndex(int):
    """A layer index that records the operations that code computes with it."""

    computed: list[str] = []  # noqa: RUF012  (shared on purpose: one trace at a time)

    def _note(self, operation: str) -> int:
        LayerIndex.computed.append(operation)
        return int(self)

    def __add__(self, other: Any) -> Any:
        return self._note("+") + other

    def __radd__(self, other: Any) -> Any:
        return other + self._note("+")

    def __sub__(self, other: Any) -> Any:
        return self._note("-") - other

    def __mul__(self, other: Any) -> Any:
        return self._note("*") * other

    def __rmul__(self, other: Any) -> Any:
        return other * self._note("*")

    def __mod__(self, other: Any) -> Any:
        return self._note("%") % other

    def __truediv__(self, other: Any) -> Any:
        return self._note("/") / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self._note("/")

    def __floordiv__(self, other: Any) -> Any:
        return self._note("//") // other

    def __lt__(self, other: Any) -> bool:
        return bool(self._note("<") < other)

    def __le__(self, other: Any) -> bool:
        return bool(self._note("<=") <= other)

    def __gt__(self, other: Any) -> bool:
        return bool(self._note(">") > other)

    def __ge__(self, other: Any) -> bool:
        return bool(self._note(">=") >= other)

    __hash__ = int.__hash__
