"""Store the reference's answers on disk, so that PyTorch runs once for each model, text and version."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmc.arrays import Array
from llmc.artifact.store.cache import StageCache, content_key
from llmc.graph.switches import crosses
from llmc.validate.batch import answer
from llmc.validate.itself import OwnDistance, compare_steps
from llmc.validate.questions import Question, ask_logits, read_logits
from llmc.validate.reference import Advance, TorchModel, quietly
from llmc.validate.sensitivity import DRAWS, Sensitivity, measure_sensitivity


class RememberedModel:
    """The `Reference` that runs PyTorch only for questions that it was not asked before.

    Every answer is stored as soon as it is computed, so that a run continues where an earlier one was killed.

    Args:
        load: Loads the original; called at the first question that the cache cannot answer.
        cache: Stores the answers, each by the digest of everything that it depends on.
        facts: Everything that all answers depend on: digests of the weights, versions of the libraries.
        window: The config's sliding window.
        switches: Lengths at which it begins to compute differently, so that the steps are part of a question.
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
        self._in_memory: dict[str, bytes] = {}
        self.window = window
        self._switches = tuple(switches)

    def logits(self, input_ids: Array, *, keep: int, pieces: Sequence[int] = ()) -> Array:
        """Do what `TorchModel.logits` does."""
        return read_logits(self.ask(ask_logits(input_ids, keep, pieces)), keep)

    def ask(self, question: Question) -> bytes:
        """Do what `TorchModel.ask` does."""
        return self._recall(self._key_of(question), lambda model: model.ask(question))

    def prepare(self, questions: Sequence[Question], advance: Advance = quietly) -> None:
        """Store the answers in the cache, so that the model can be released; one pass computes many of them.

        Args:
            advance: Called with the number of new answers and the number of questions without an answer
                before.
        """
        asked = {self._key_of(question): question for question in questions}
        unknown = {key: question for key, question in asked.items() if not self._holds(key)}
        if not unknown:
            return
        keys, done = list(unknown), 0
        advance(done, len(keys))
        for logits_by_number in answer(self._loaded(), list(unknown.values())):
            done += len(logits_by_number)
            for number in list(logits_by_number):  # free the memory before the next pass
                self._put(keys[number], unknown[keys[number]].reduce(logits_by_number.pop(number)))
            advance(done, len(keys))

    def logits_at(self, input_ids: Array, positions: Array, *, pieces: Sequence[int] = ()) -> Array:
        """Do what `TorchModel.logits_at` does."""

        def ask(model: TorchModel) -> bytes:
            logits = model.logits_at(input_ids, positions, pieces=pieces)
            return np.ascontiguousarray(logits, np.float32).tobytes()

        settings = [*input_ids.shape, *positions.tolist(), -1, *pieces]
        data = self._recall(self._key("logits at", input_ids, settings), ask)
        return np.frombuffer(data, np.float32).reshape((*input_ids.shape[:-1], len(positions), -1))

    def greedy(self, input_ids: Array, steps: int) -> Array:
        """Do what `TorchModel.greedy` does."""
        key = self._key("greedy", input_ids, [steps])
        data = self._recall(key, lambda model: model.greedy(input_ids, steps).tobytes())
        return np.frombuffer(data, np.int64).copy()

    def sensitivity(self, input_ids: Array, positions: Array, *, pieces: Sequence[int] = ()) -> Sensitivity:
        """Do what `measure_sensitivity` does, for `positions` (n,) of input_ids (sequence,)."""

        def ask(model: TorchModel) -> bytes:
            sensitivity = measure_sensitivity(
                model.model, lambda: model.logits_at(input_ids, positions, pieces=pieces)
            )
            return np.stack([sensitivity.logits, sensitivity.kl, sensitivity.largest]).tobytes()

        settings = [DRAWS, *positions.tolist(), -1, *pieces]
        data = self._recall(self._key("sensitivity", input_ids, settings), ask)
        return Sensitivity(*np.frombuffer(data, np.float64).reshape(3, len(positions)))

    def own_distance(self, input_ids: Array, pieces: Sequence[int]) -> OwnDistance:
        """Do what `compare_steps` does, for input_ids (rows, sequence)."""

        def ask(model: TorchModel) -> bytes:
            distance = compare_steps(model, input_ids, pieces)
            return np.stack([distance.logits, distance.other]).tobytes()

        data = self._recall(self._key("own distance", input_ids, [*input_ids.shape, *pieces]), ask)
        return OwnDistance(*np.frombuffer(data, np.float64).reshape(2, len(input_ids), -1))

    def release(self) -> TorchModel | None:
        """Release the model, and return it if it was loaded; a later question loads it again."""
        model, self._model = self._model, None
        return model

    def _loaded(self) -> TorchModel:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _key_of(self, question: Question) -> str:
        crossed = crosses(question.pieces, len(question.input_ids), self._switches)
        settings = [question.keep, *(question.pieces if crossed else ()), *question.settings]
        return self._key(question.what, question.input_ids, settings)

    def _key(self, what: str, input_ids: Array, settings: Sequence[str | int]) -> str:
        tokens = hashlib.sha256(input_ids.astype(np.int64).tobytes()).hexdigest()
        facts = {**self._facts, "what": what, "tokens": tokens, "settings": list(settings)}
        return content_key("reference", facts)

    def _recall(self, key: str, ask: Callable[[TorchModel], bytes]) -> bytes:
        data = self._in_memory.get(key) or self._cache.get(key)
        if data is None:
            data = ask(self._loaded())
            self._put(key, data)
        return data

    def _holds(self, key: str) -> bool:
        return key in self._in_memory or self._cache.holds(key)

    def _put(self, key: str, data: bytes) -> None:
        """Store an answer on disk, or in memory if the cache does not accept it."""
        self._cache.put(key, data)
        if not self._cache.holds(key):
            self._in_memory[key] = data
