"""Parse TensorRT's log: the errors of a call, and the memory and layers of a build."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_SCRATCH = re.compile(r"^Max Scratch Memory: (\d+) bytes")
_WEIGHTS = re.compile(r"^Total Weights Memory: (\d+) bytes")
#: Headings of the list of layers: TensorRT-RTX's and TensorRT's.
_LAYERS = ("Layers:", "Engine Layer Information:")
#: Largest number of TensorRT's messages that an error quotes.
_QUOTED = 3


@dataclass
class BuildLog:
    """The relevant parts of TensorRT's log.

    Args:
        errors: Messages of the last call that was attempted.
        scratch: Scratch memory of each optimization profile.
        weights: Bytes of the weights; None before a build states them.
        lines: Lines about layers, one each.
    """

    errors: list[str] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)
    weights: int | None = None
    lines: list[str] = field(default_factory=list)

    def take(self, severity: int, text: str) -> None:
        """Process a message; severities as in TensorRT, 0 and 1 are errors."""
        if severity <= 1:
            self.errors.append(text)
        elif text.startswith(_LAYERS):
            self.lines += [line for line in text.splitlines() if line.startswith("Name: ")]
        elif (match := _SCRATCH.match(text)) is not None:
            self.scratch.append(int(match[1]))
        elif (match := _WEIGHTS.match(text)) is not None:
            self.weights = int(match[1])

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of TensorRT and return its result; `reason` then quotes the errors of this call."""
        self.errors.clear()
        return function(*arguments)

    def reason(self) -> str:
        """Return the newest errors of the last attempt as TensorRT states them."""
        texts = [" ".join(text.split()) for text in self.errors[-_QUOTED:]]
        return "; ".join(texts) or "it gives no reason"


def make_logger(trt: Any, log: BuildLog) -> Any:
    """Create a logger for TensorRT that passes every message to `log`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            log.take(int(severity), text)

    return Logger()
