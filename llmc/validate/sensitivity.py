"""Measure how far rounding in float32 moves the original at single positions.

Most positions of a trained model move by 1e-5 logits when sums are computed in another order. Where a softmax
weighs two scores that are nearly equal and huge, or an expert is chosen by a hair, the same change decides
the result, and the logits of that one position move by whole numbers. No other program of the model can be
expected to match them. Such positions are found as in stochastic arithmetic (Vignes 1993): the original is
run again with every module's output changed at random by a few units in the last place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmc.arrays import Array
from llmc.validate.distribution import log_softmax

#: Number of runs with random rounding; the worst of them counts.
DRAWS = 8
#: Relative standard deviation of the change: four units in the last place of float32, which is the error of
#: sums of some tens of terms in another order.
_CHANGE = 2.0**-21
#: Maximum share of the positions of a measurement that may be left out.
MOST_LEFT_OUT = 0.05


@dataclass(frozen=True)
class Sensitivity:
    """The effect of rounding alone on some positions of a text.

    Args:
        logits: (positions,), largest change of a logit.
        kl: (positions,), KL divergence of the changed distribution, nats.
        largest: (positions,), largest magnitude of a logit.
    """

    logits: Array
    kl: Array
    largest: Array


class SensitiveReference(Protocol):
    """The original whose sensitivity to rounding can be measured."""

    def sensitivity(self, input_ids: Array, positions: Array, *, pieces: Sequence[int] = ()) -> Sensitivity:
        """Measure it at `positions` (n,) of input_ids (sequence,), as `Reference.logits_at` takes them."""
        ...


def measure_sensitivity(model: Any, ask: Callable[[], Array]) -> Sensitivity:
    """Run the original with random rounding, and compare with its results without it.

    Args:
        model: The PyTorch module.
        ask: Lets it compute logits, (positions, vocabulary) float32.
    """
    exact = ask()
    p = log_softmax(exact.astype(np.float64))
    logits, kl = np.zeros(len(exact)), np.zeros(len(exact))
    for seed in range(DRAWS):
        with _random_rounding(model, seed):
            moved = ask()
        logits = np.maximum(logits, np.abs(moved - exact).max(axis=1))
        divergence = np.exp(p) * (p - log_softmax(moved.astype(np.float64)))
        kl = np.maximum(kl, divergence.sum(axis=1))
    return Sensitivity(logits, kl, np.abs(exact).max(axis=1).astype(np.float64))


def find_unstable(reference: SensitiveReference, windows: Array, kl: Array, bound: float) -> Array:
    """Find the positions of windows that rounding alone moves by more than a bound on KL divergence.

    Windows are checked in the order of their worst position, until rounding explains no position of a window.

    Args:
        windows: (windows, tokens) int64.
        kl: (windows, steps) of the artifact, for the next token after each of the last positions but one.
        bound: Nats per token.

    Returns:
        (windows, steps) bool; all False if more than MOST_LEFT_OUT of them would be True.
    """
    unstable = np.zeros(kl.shape, bool)
    for at in np.argsort(-kl.max(axis=1)):
        if kl[at].max() <= bound:
            break
        asked = np.arange(windows.shape[1] - 1 - kl.shape[1], windows.shape[1] - 1)
        moved = reference.sensitivity(windows[at, :-1], asked).kl
        unstable[at] = moved > bound
        if not (unstable[at] & (kl[at] > bound)).any():
            break
    return unstable if unstable.mean() <= MOST_LEFT_OUT else np.zeros(kl.shape, bool)


@contextmanager
def _random_rounding(model: Any, seed: int) -> Iterator[None]:
    """Change the output of every module without children by a few units in the last place."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def change(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            return value * (1 + _CHANGE * noise)
        if type(value) in (tuple, list):
            return type(value)(change(part) for part in value)
        return value

    parts: Sequence[Any] = [module for module in model.modules() if not any(module.children())]
    hooks = [part.register_forward_hook(lambda _, __, output: change(output)) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
