"""Step through a transformers model as through any session: prefill, decode, padded rows, and back.

Keys and values grow by concatenation, so that an earlier point of a sequence is a range of them. The cache
keeps those of sliding windows whole; the model's own masks hide what lies outside of a window. A model with
states of fixed size runs every step from the first token, since transformers neither goes back to an earlier
state nor continues one by several tokens.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.errors import LlmcError
from llmc.graph.interface import Interface
from llmc.runtime.failures import typed_error
from llmc.validate.attention import attention_by_rows
from llmc.validate.reference import TorchModel


def interface_in_transformers(interface: Interface, window: int | None) -> Interface:
    """Return the interface of a traced graph as its model in transformers has it.

    transformers counts a sliding window in slots of the cache, those of padding between tokens included, so
    that the rows of a batch are padded on the left.

    Args:
        window: The config's sliding window in positions; None if it has none.
    """
    windows = window is not None or any(slot.window is not None for slot in interface.cache)
    if not windows or interface.padding == "none":
        return interface
    return interface.model_copy(update={"padding": "left"})


@dataclass(frozen=True)
class TorchState:
    """A point of a sequence.

    Args:
        tokens: The tokens so far, (batch, total) int64.
        mask: 1 where a token is real, (batch, total) int64.
        layers: The cache of each layer; empty for a model with states.
    """

    tokens: Array
    mask: Array
    layers: tuple[Any, ...]


class TorchSession:
    """A `Rewindable` over a transformers causal language model on the CPU.

    Args:
        model: The model, float32.
        interface: The interface of the graph that was traced from the same model.
        where: What executes it, for reports.
    """

    def __init__(self, model: Any, interface: Interface, where: str) -> None:
        self.interface = interface
        self.where = where
        self._model = TorchModel(model)
        self._arguments = inspect.signature(model.forward).parameters
        self._steps_back = not interface.states
        self._cache: Any = None
        self._tokens: Array = np.zeros((0, 0), np.int64)
        self._mask: Array = np.zeros((0, 0), np.int64)

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        """Run a prompt from an empty cache.

        Args:
            input_ids: (batch, sequence) int64.
            mask: (batch, sequence) int64, 1 where a token is real; None if all are.
            steps: Decode steps that will follow; the cache grows by itself.

        Returns:
            Logits, (batch, sequence, vocabulary) float32; of the last token alone by such an interface.

        Raises:
            ParityError: The model fails.
            ResourceError: Memory ran out.
        """
        self._tokens, self._mask = input_ids[:, :0], input_ids[:, :0]
        self._cache = self._empty_cache() if self._steps_back else None
        return self._advance(input_ids, np.ones_like(input_ids) if mask is None else mask)

    def decode(self, tokens: Array) -> Array:
        """Run one or more further tokens of every row, (batch, sequence); return logits as `prefill` does."""
        return self._advance(tokens, np.ones_like(tokens))

    def next_tokens(self, tokens: Array) -> Array:
        """Run one more token of every row, (batch,), and return the most likely next ones, (batch,)."""
        chosen: Array = self.decode(tokens[:, None])[:, -1].argmax(axis=-1)
        return chosen

    def state(self) -> TorchState:
        """Return this point of the sequence; later steps replace its tensors and do not change them."""
        layers = () if self._cache is None else tuple(copy.copy(layer) for layer in self._cache.layers)
        return TorchState(self._tokens, self._mask, layers)

    def restore(self, state: TorchState) -> None:
        """Go back to `state`, taken since the last prefill."""
        self.rewind(state, state.tokens.shape[1])

    def rewind(self, state: TorchState, total: int) -> None:
        """Go back to the first `total` tokens of `state`, taken since the last prefill."""
        removed = state.tokens.shape[1] - total
        self._tokens, self._mask = state.tokens[:, :total], state.mask[:, :total]
        if self._steps_back:
            self._cache.layers = [_cropped(layer, removed) for layer in state.layers]

    def _advance(self, tokens: Array, mask: Array) -> Array:
        """Run `tokens` after those so far, and return their logits."""
        new = tokens.shape[1]
        self._tokens = np.concatenate([self._tokens, tokens], axis=1)
        self._mask = np.concatenate([self._mask, mask], axis=1)
        first = self._tokens.shape[1] - new if self._steps_back else 0
        requested = 1 if self.interface.logits == "last" else new
        logits = self._run(first, requested)
        return logits[:, -requested:].float().numpy()  # type: ignore[no-any-return]

    def _run(self, first: int, requested: int) -> Any:
        """Run the tokens from `first` on over the cache; return logits of at least the last `requested`."""
        import torch

        ids, total = self._tokens[:, first:], self._tokens.shape[1]
        given: dict[str, Any] = {}
        if not self._mask.all():
            given["attention_mask"] = torch.from_numpy(self._mask.copy())
        if "position_ids" in self._arguments:
            positions = np.maximum(np.cumsum(self._mask, axis=1) - 1, 0)[:, first:]
            given["position_ids"] = torch.from_numpy(positions.copy())
        if "logits_to_keep" in self._arguments:
            given["logits_to_keep"] = requested
        with torch.inference_mode(), _failing(ids.shape), self._in_rows(ids.shape[1], total):
            out, self._cache = self._model.run(
                torch.from_numpy(ids.copy()), self._cache, use_cache=self._steps_back, **given
            )
        return out.logits

    def _in_rows(self, queries: int, keys: int) -> Any:
        return attention_by_rows(self._model.model, queries, keys)

    def _empty_cache(self) -> Any:
        """Return the cache that transformers makes for the model, with sliding windows kept whole."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        whole: Any = DynamicLayer
        cache: Any = DynamicCache(config=self._model.model.config)
        cache.layers = [
            whole() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers
        ]
        return cache


def _cropped(layer: Any, removed: int) -> Any:
    """Return a layer of a cache without its last `removed` tokens; the given one is unchanged."""
    cropped = copy.copy(layer)
    cropped.crop(-removed)
    return cropped


@contextmanager
def _failing(shape: tuple[int, ...]) -> Iterator[None]:
    """Convert errors of the model to a ParityError, or to a ResourceError where memory ran out."""
    try:
        yield
    except LlmcError:
        raise
    except Exception as error:  # model code and torch raise many kinds of errors
        fact = f"transformers fails at a step of {shape[1]} tokens of {shape[0]} rows"
        raise typed_error(error, f"{fact}: {type(error).__name__}") from error
