"""The reference's answers kept on disk, so that PyTorch runs once for each model, text and version."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmc.artifact.cache import StageCache, content_key
from llmc.validate.reference import TorchModel

Array = np.ndarray


class RememberedModel:
    """A `Reference` that asks PyTorch only for what it has not been asked before.

    Args:
        load: Loads the original; called at the first question that the cache cannot answer.
        cache: Where answers are kept, each by the digest of everything that it depends on.
        facts: What all answers depend on: digests of the weights, versions of what computes them.
        window: The config's sliding window.
    """

    def __init__(
        self,
        load: Callable[[], TorchModel],
        cache: StageCache,
        facts: Mapping[str, object],
        window: int | None,
    ) -> None:
        self._load = load
        self._cache = cache
        self._facts = dict(facts)
        self._model: TorchModel | None = None
        self.window = window

    def logits(self, input_ids: Array, *, keep: int) -> Array:
        """As `TorchModel.logits`."""
        data = self._recall(
            "logits",
            input_ids,
            [keep],
            lambda model: np.ascontiguousarray(model.logits(input_ids, keep=keep), np.float32),
        )
        return np.frombuffer(data, np.float32).reshape(keep, -1).copy()

    def greedy(self, input_ids: Array, steps: int) -> Array:
        """As `TorchModel.greedy`."""
        data = self._recall("greedy", input_ids, [steps], lambda model: model.greedy(input_ids, steps))
        return np.frombuffer(data, np.int64).copy()

    def generate(self, input_ids: Array, new_tokens: int, stop: Sequence[int]) -> Array:
        """As `TorchModel.generate`."""
        data = self._recall(
            "generate",
            input_ids,
            [new_tokens, *stop],
            lambda model: model.generate(input_ids, new_tokens, stop),
        )
        return np.frombuffer(data, np.int64).copy()

    def release(self) -> None:
        """Let go of the model, if it was loaded; a later question loads it again."""
        self._model = None

    def _recall(
        self, what: str, input_ids: Array, settings: list[int], ask: Callable[[TorchModel], Array]
    ) -> bytes:
        tokens = hashlib.sha256(input_ids.astype(np.int64).tobytes()).hexdigest()
        facts = {**self._facts, "what": what, "tokens": tokens, "settings": settings}
        key = content_key("reference", facts)
        known = self._cache.get(key)
        if known is None:
            if self._model is None:
                self._model = self._load()
            known = ask(self._model).tobytes()
            self._cache.put(key, known)
        return known
