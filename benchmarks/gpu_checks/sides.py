"""Give every model that is timed the same three operations: a prompt, a step, and going back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from gpu_checks.room import require_torch_cuda, torch_memory
from llmc.runtime.session import Rewindable


class Side(ABC):
    """A model over the cache of one batch, whose tokens come back to the host after every step."""

    @abstractmethod
    def prefill(self, ids: np.ndarray, steps: int) -> np.ndarray:
        """Run prompts (batch, sequence) with room for `steps`; return the next tokens, (batch,)."""

    @abstractmethod
    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Run one more token of each row, (batch,); return the next tokens, (batch,)."""

    @abstractmethod
    def back(self, steps: int) -> None:
        """Take back the last `steps` tokens of each row."""


class SessionSide(Side):
    """A session of llmc."""

    def __init__(self, session: Rewindable) -> None:
        self._session = session
        self._state: Any = None

    def prefill(self, ids: np.ndarray, steps: int) -> np.ndarray:
        """See `Side`."""
        logits = self._session.prefill(ids, steps=steps)
        self._state = self._session.state()
        return logits[:, -1].argmax(-1)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """See `Side`."""
        return self._session.next_tokens(tokens)

    def back(self, steps: int) -> None:
        """See `Side`."""
        self._session.restore(self._state)


class TorchSide(Side):
    """A model of transformers on the GPU.

    Args:
        model: The model, in evaluation mode.
        compiled: Whether steps run through torch.compile with CUDA graphs over a static cache; otherwise they
            run eagerly over a cache that grows.
    """

    def __init__(self, model: Any, *, compiled: bool) -> None:
        self._torch = require_torch_cuda()
        self._model, self._compiled = model, compiled
        self._cache: Any = None
        self._step: Any = model
        if compiled:
            self._torch.compiler.reset()
            self._step = self._torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def prefill(self, ids: np.ndarray, steps: int) -> np.ndarray:
        """See `Side`."""
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        self._cache = (
            StaticCache(config=config, max_cache_len=ids.shape[1] + steps)
            if self._compiled
            else DynamicCache(config=config)
        )
        return self._run(self._model, ids)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """See `Side`."""
        return self._run(self._step, tokens[:, None])

    def back(self, steps: int) -> None:
        """See `Side`."""
        self._cache.crop(-steps)

    def _run(self, model: Any, ids: np.ndarray) -> np.ndarray:
        torch = self._torch
        with torch_memory(), torch.inference_mode():
            given = torch.from_numpy(ids).cuda()
            out = model(input_ids=given, cache=self._cache, use_cache=True, logits_to_keep=1)
            tokens: np.ndarray = out.logits[:, -1].argmax(-1).cpu().numpy()
        return tokens
