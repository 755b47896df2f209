"""The reference's answers kept on disk, so that PyTorch runs once for each model, text and version."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmc.artifact.cache import StageCache, content_key
from llmc.graph.switches import crosses
from llmc.validate.conditioning import PROMPTS, STEPS, Conditioning, measure_conditioning
from llmc.validate.distribution import Distributions
from llmc.validate.reference import Score, TorchModel
from llmc.validate.sensitivity import DRAWS, Sensitivity, measure_sensitivity

Array = np.ndarray


class RememberedModel:
    """A `Reference` that asks PyTorch only for what it has not been asked before.

    Args:
        load: Loads the original; called at the first question that the cache cannot answer.
        cache: Where answers are kept, each by the digest of everything that it depends on.
        facts: What all answers depend on: digests of the weights, versions of what computes them.
        window: The config's sliding window.
        switches: Lengths at which it begins to compute otherwise, so that the steps are part of a question.
    """

    def __init__(
        self,
        load: Callable[[], TorchModel],
        cache: StageCache,
        facts: Mapping[str, object],
        window: int | None,
        switches: Sequence[int] = (),
    ) -> None:
        self._load = load
        self._cache = cache
        self._facts = dict(facts)
        self._model: TorchModel | None = None
        self.window = window
        self._switches = tuple(switches)

    def logits(self, input_ids: Array, *, keep: int, pieces: Sequence[int] = ()) -> Array:
        """As `TorchModel.logits`."""

        def ask(model: TorchModel) -> bytes:
            logits = model.logits(input_ids, keep=keep, pieces=pieces)
            return np.ascontiguousarray(logits, np.float32).tobytes()

        data = self._recall("logits", input_ids, self._settings(input_ids, keep, pieces), ask)
        return np.frombuffer(data, np.float32).reshape(keep, -1).copy()

    def distributions(self, input_ids: Array, *, keep: int, pieces: Sequence[int] = ()) -> Distributions:
        """As `TorchModel.distributions`."""
        settings = self._settings(input_ids, keep, pieces)
        data = self._recall("distributions", input_ids, settings, _ask_distributions(input_ids, keep, pieces))
        return Distributions.from_bytes(data, keep)

    def prepare(self, input_ids: Array, *, keep: int, pieces: Sequence[int] = ()) -> None:
        """Have the answer of `distributions` in the cache, so that the model can be released."""
        settings = self._settings(input_ids, keep, pieces)
        if not self._cache.holds(self._key("distributions", input_ids, settings)):
            self.distributions(input_ids, keep=keep, pieces=pieces)

    def greedy(self, input_ids: Array, steps: int) -> Array:
        """As `TorchModel.greedy`."""
        data = self._recall(
            "greedy", input_ids, [steps], lambda model: model.greedy(input_ids, steps).tobytes()
        )
        return np.frombuffer(data, np.int64).copy()

    def generate(self, input_ids: Array, new_tokens: int, stop: Sequence[int]) -> Array:
        """As `TorchModel.generate`."""
        data = self._recall(
            "generate",
            input_ids,
            [new_tokens, *stop],
            lambda model: model.generate(input_ids, new_tokens, stop).tobytes(),
        )
        return np.frombuffer(data, np.int64).copy()

    def score(self, prompt: Array, choice: Array) -> Score:
        """As `TorchModel.score`."""
        data = self._recall(
            "score", np.concatenate([prompt, choice]), [len(choice)], _ask_score(prompt, choice)
        )
        log_likelihood, greedy = np.frombuffer(data, np.float64).tolist()
        return Score(log_likelihood, bool(greedy))

    def conditioning(self, tokens: Array, limit: int | None) -> Conditioning:
        """How far rounding moves the model itself, as `measure_conditioning` finds it."""

        def ask(model: TorchModel) -> bytes:
            found = measure_conditioning(model, tokens, limit)
            return np.array([found.difference, found.largest, found.spread], np.float64).tobytes()

        data = self._recall("conditioning and spread", tokens, [*PROMPTS, STEPS, limit or 0], ask)
        return Conditioning(*np.frombuffer(data, np.float64).tolist())

    def sensitivity(self, input_ids: Array, *, keep: int) -> Sensitivity:
        """As `measure_sensitivity`."""

        def ask(model: TorchModel) -> bytes:
            found = measure_sensitivity(model, input_ids, keep=keep)
            return np.stack([found.logits, found.kl]).tobytes()

        data = self._recall("sensitivity", input_ids, [keep, DRAWS], ask)
        return Sensitivity(*np.frombuffer(data, np.float64).reshape(2, keep))

    def release(self) -> TorchModel | None:
        """Let go of the model, and hand it over if it was loaded; a later question loads it again."""
        model, self._model = self._model, None
        return model

    def _settings(self, input_ids: Array, keep: int, pieces: Sequence[int]) -> list[int]:
        """What a question's answer depends on besides its tokens."""
        return [keep, *(pieces if crosses(pieces, len(input_ids), self._switches) else ())]

    def _key(self, what: str, input_ids: Array, settings: list[int]) -> str:
        tokens = hashlib.sha256(input_ids.astype(np.int64).tobytes()).hexdigest()
        facts = {**self._facts, "what": what, "tokens": tokens, "settings": settings}
        return content_key("reference", facts)

    def _recall(
        self, what: str, input_ids: Array, settings: list[int], ask: Callable[[TorchModel], bytes]
    ) -> bytes:
        key = self._key(what, input_ids, settings)
        known = self._cache.get(key)
        if known is None:
            if self._model is None:
                self._model = self._load()
            known = ask(self._model)
            self._cache.put(key, known)
        return known


def _ask_score(prompt: Array, choice: Array) -> Callable[[TorchModel], bytes]:
    def ask(model: TorchModel) -> bytes:
        made = model.score(prompt, choice)
        return np.array([made.log_likelihood, made.greedy], np.float64).tobytes()

    return ask


def _ask_distributions(input_ids: Array, keep: int, pieces: Sequence[int]) -> Callable[[TorchModel], bytes]:
    return lambda model: model.distributions(input_ids, keep=keep, pieces=pieces).to_bytes()
