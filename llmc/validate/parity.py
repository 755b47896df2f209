"""Parity levels: the artifact's logits against the original's, in prefill, decode and ragged batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.errors import ConfigError
from llmc.validate.attention import SCORE_BYTES
from llmc.validate.distribution import log_softmax
from llmc.validate.measure import max_abs, measure, measured, require_comparable, unmeasured
from llmc.validate.ragged import Row, compare_ragged
from llmc.validate.reference import Reference
from llmc.validate.session import Session

Array = np.ndarray

CACHE = (Metric.CACHE_KL_MEAN, Metric.CACHE_KL_MAX)
#: Prompt lengths of the prefill level, in tokens.
PREFILL_LENGTHS = (1, 2, 17, 128, 512)
#: Prompt lengths and teacher-forced steps of the decode level.
DECODE_PROMPTS = (1, 16, 100)
DECODE_STEPS = 64
#: Sizes of the pieces that a prompt is prefilled in, one after the other over the same cache.
CHUNKS = (7, 1, 16, 2, 40)
#: Row lengths and steps of the ragged batch.
RAGGED_LENGTHS = (11, 2, 19, 5)
RAGGED_STEPS = 8
#: Decode steps after a prompt around or beyond a sliding window.
WINDOW_STEPS = 6
#: Decode steps after a prompt just before or beyond a switch.
SWITCH_STEPS = 4
#: How far a prompt goes beyond a sliding window, at most.
WINDOW_EXCESS = 64
#: Teacher-forced steps at the end of the longest context, where the KV cache is narrower than the logits.
CACHE_STEPS = 128


@dataclass(frozen=True)
class Parity:
    """The two models and the token ids that prompts are cut from.

    Args:
        model: The artifact.
        reference: The original, float32.
        tokens: (n,) int64 token ids below the vocabulary size, repeated where a prompt needs more;
            text makes better prompts than noise.
        heads: Attention heads of the original, which bound the longest prompt by memory.
        switches: Total lengths beyond which the original computes otherwise; both sides of each are measured.
        lengths: Further lengths to look around, as far as the longest prompt goes.
        rows: Most rows of a batch that the artifact takes; None for any number.

    Raises:
        ConfigError: There are fewer than two tokens.
    """

    model: Session
    reference: Reference
    tokens: Array
    heads: int = 1
    switches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    rows: int | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) < 2:
            raise ConfigError(
                f"parity was given {len(self.tokens)} tokens to make prompts of", hint="use a longer text"
            )

    def measure(self) -> tuple[Measurement, ...]:
        """All levels, each on its own; a level is NaN if the artifact breaks in it."""
        where = self.model.where
        return (
            *measure((Metric.PREFILL_MAX_ABS,), where, self.prefill),
            *measure((Metric.CHUNKS_MAX_ABS,), where, self.chunks),
            *measure((Metric.DECODE_MAX_ABS, Metric.DECODE_TOP1), where, self.decode),
            *measure((Metric.RAGGED_MAX_ABS,), where, self.ragged),
            *measure((Metric.WINDOW_MAX_ABS,), where, self.window),
            *(measure(CACHE, where, self.cache) if self._narrow() else ()),
        )

    def prefill(self) -> tuple[Measurement, ...]:
        """Largest difference over prompts of several lengths, each in one run from an empty cache.

        Among them are the longest that there is room for, and those just before and beyond every switch,
        however long.
        """
        around = {at + step for at in self.lengths for step in (-1, 0, 1)}
        longest = self._longest()
        lengths = sorted(n for n in {*PREFILL_LENGTHS, *around, longest} if n <= longest)
        differences = {}
        for length in lengths:
            prompt = self._cut(length, length)
            expected = self.reference.logits(prompt, keep=length if self._every() else 1)
            logits = self.model.prefill(prompt[None], steps=0)[0]
            differences[length] = max_abs(logits, expected, f"prefill of {length} tokens")
        for length, steps in self._beside_switches():
            sequence, expected = self._continued(length, steps)
            logits = self.model.prefill(sequence[None, :length], steps=0)[0, -1]
            differences[length] = max_abs(logits, expected[0], f"prefill of {length} tokens")
        lengths = sorted(differences)
        detail = f"prompts of {_listed(lengths)} tokens, {'every' if self._every() else 'last'} position"
        if unseen := [at for at in self.lengths if at not in self.switches and longest < at < self._limit()]:
            detail += f"; not around {_listed(unseen)}, where nothing switches"
        figures = {f"length_{n}": value for n, value in differences.items()}
        worst = max(differences.values())
        return (measured(Metric.PREFILL_MAX_ABS, worst, detail, self.model.where, figures),)

    def chunks(self) -> tuple[Measurement, ...]:
        """Largest difference at the end of each piece of a prompt that is prefilled in pieces."""
        pieces: tuple[int, ...] = CHUNKS
        while sum(pieces) > self._limit():
            pieces = pieces[:-1]
        if len(pieces) < 2:
            why = f"the model ends at {self._limit()} positions, two pieces do not fit"
            return (self._not_measured(Metric.CHUNKS_MAX_ABS, MeasurementStatus.NOT_MEASURED, why),)
        ends = np.cumsum(pieces)
        prompt = self._cut(int(ends[-1]), 3)
        expected = self.reference.logits(prompt, keep=len(prompt), pieces=pieces)
        self.model.prefill(prompt[None, : pieces[0]], steps=len(prompt) - pieces[0])
        figures = {}
        for start, end in pairwise(int(e) for e in ends):
            logits = self.model.decode(prompt[None, start:end])[0]
            wanted = expected[end - len(logits) : end]
            figures[f"tokens_{start}_to_{end}"] = max_abs(
                logits, wanted, f"the piece of tokens {start} to {end}"
            )
        detail = f"{len(prompt)} tokens in pieces of {_listed(pieces)}"
        worst = max(figures.values())
        return (measured(Metric.CHUNKS_MAX_ABS, worst, detail, self.model.where, figures),)

    def decode(self) -> tuple[Measurement, ...]:
        """Largest difference, and share of equal argmax, over cached steps.

        Each step is fed the original's greedy token whatever the artifact would have chosen, so that
        an early difference does not hide a later one. Further prompts end just before each switch, which the
        steps cross, and just beyond it.
        """
        metrics = (Metric.DECODE_MAX_ABS, Metric.DECODE_TOP1)
        steps = min(DECODE_STEPS, self._limit() // 2)
        prompts = [n for n in DECODE_PROMPTS if n + steps <= self._limit()]
        if steps < 1:
            why = f"the model ends at {self._limit()} positions, no step fits"
            return tuple(self._not_measured(m, MeasurementStatus.NOT_MEASURED, why) for m in metrics)
        differences, equal = {}, []
        for length in prompts:
            prompt = self._cut(length, length)
            sequence = np.concatenate([prompt, self.reference.greedy(prompt, steps)])
            expected = self.reference.logits(sequence, keep=steps, pieces=(length,))
            worst = 0.0
            self.model.prefill(prompt[None], steps=steps)
            for step, (token, wanted) in enumerate(zip(sequence[length:], expected, strict=True)):
                logits = self.model.decode(token.reshape(1, 1))[0, -1]
                worst = max(worst, max_abs(logits, wanted, f"decode step {step + 1} after {length} tokens"))
                equal.append(int(logits.argmax()) == int(wanted.argmax()))
            differences[length] = worst
        for length, further in self._beside_switches():
            differences[length] = self._alone(length, further, "a switch of the rotary embedding")
        detail = f"{steps} teacher-forced steps after prompts of {_listed(prompts)} tokens"
        if beside := self._beside_switches():
            detail += (
                f", and around switches {_listed(self.switches)} after {_listed([n for n, _ in beside])}"
            )
        figures = {f"prompt_{n}": value for n, value in differences.items()}
        share = float(np.mean(equal))
        return (
            measured(metrics[0], max(differences.values()), detail, self.model.where, figures),
            measured(metrics[1], share, f"{detail}, {len(equal)} steps", self.model.where),
        )

    def ragged(self) -> tuple[Measurement, ...]:
        """Largest difference over the real tokens of a padded batch, in prefill and decode.

        The original runs each row alone, without padding.
        """
        if self.rows == 1:
            why = "the artifact takes one row at a time"
            return (self._not_measured(Metric.RAGGED_MAX_ABS, MeasurementStatus.NOT_APPLICABLE, why),)
        if not self._sides():
            return self._even()
        lengths = [n for n in RAGGED_LENGTHS if n + RAGGED_STEPS <= self._limit()][: self.rows]
        if len(lengths) < min(3, self.rows or 3):
            why = f"the model ends at {self._limit()} positions, three rows do not fit"
            return (self._not_measured(Metric.RAGGED_MAX_ABS, MeasurementStatus.NOT_MEASURED, why),)
        rows = list(self._rows(lengths, RAGGED_STEPS))
        figures = {
            f"{side}_padded": compare_ragged(self.model, rows, RAGGED_STEPS, side) for side in self._sides()
        }
        detail = (
            f"{len(rows)} rows of {_listed(lengths)} tokens and {RAGGED_STEPS} steps,"
            f" padded {' and '.join(self._sides())}"
        )
        worst = max(figures.values())
        return (measured(Metric.RAGGED_MAX_ABS, worst, detail, self.model.where, figures),)

    def _even(self) -> tuple[Measurement, ...]:
        """In place of a ragged batch where the graph takes no padding: a batch of equal rows."""
        length = min(RAGGED_LENGTHS[0], self._limit() - RAGGED_STEPS)
        if length < 1:
            why = f"the model ends at {self._limit()} positions, {RAGGED_STEPS} steps do not fit"
            return (self._not_measured(Metric.RAGGED_MAX_ABS, MeasurementStatus.NOT_MEASURED, why),)
        rows = list(self._rows([length] * min(3, self.rows or 3), RAGGED_STEPS))
        worst = compare_ragged(self.model, rows, RAGGED_STEPS, "left")
        detail = f"{len(rows)} rows of {length} tokens and {RAGGED_STEPS} steps; the graph takes no padding"
        return (measured(Metric.RAGGED_MAX_ABS, worst, detail, self.model.where),)

    def window(self) -> tuple[Measurement, ...]:
        """Largest difference around each sliding window.

        Prompts of window - 1, window and window + 1 tokens and beyond; decode that crosses them; a
        ragged batch with rows on both sides of it. The windows are those of the interface and of
        the original's config, so that one that the artifact forgot is measured as well.
        """
        stated = {slot.window for slot in self.model.interface.cache} | {self.reference.window}
        limit = self._limit()
        windows = sorted(w for w in stated if w is not None and w < limit)
        if not windows:
            found = _listed(sorted(w for w in stated if w is not None))
            why = f"window {found} never ends within {limit} positions" if found else "no sliding window"
            return (self._not_measured(Metric.WINDOW_MAX_ABS, MeasurementStatus.NOT_APPLICABLE, why),)
        longest = limit - WINDOW_STEPS
        figures = {}
        for window in windows:
            for prompt in sorted({max(1, window - 1), window, window + 1}):
                if prompt + WINDOW_STEPS <= limit:
                    worst = self._alone(prompt, WINDOW_STEPS, f"window {window}")
                    figures[f"window_{window}_prompt_{prompt}"] = worst
            crossing, beyond = max(1, window - 2), window + 1 + min(window // 2, WINDOW_EXCESS)
            for prompt in (min(crossing, longest), min(beyond, longest)):
                worst = self._alone(prompt, WINDOW_STEPS, f"window {window}")
                figures[f"window_{window}_prompt_{prompt}"] = worst
            lengths = [min(n, longest) for n in (max(2, window - 1), window + 3, max(2, window // 2))]
            lengths = lengths[: self.rows]
            rows = list(self._rows(lengths, WINDOW_STEPS))
            for side in self._sides():
                worst = compare_ragged(self.model, rows, WINDOW_STEPS, side)
                figures[f"window_{window}_{side}_padded"] = worst
        detail = (
            f"windows of {_listed(windows)}: decode across each, prompts beyond each,"
            f" ragged rows padded {' and '.join(self._sides()) or 'nowhere'}"
        )
        worst = max(figures.values())
        return (measured(Metric.WINDOW_MAX_ABS, worst, detail, self.model.where, figures),)

    def cache(self) -> tuple[Measurement, ...]:
        """KL divergence over cached steps at the end of the longest context that there is room for.

        The original has nothing rounded but the artifact's weights, so that all that a narrow cache loses is
        in it, and whatever else the artifact rounds.
        """
        prompt = min(self._longest(), self._limit()) - CACHE_STEPS
        if prompt < 1:
            why = f"{CACHE_STEPS} steps do not fit into {self._longest()} positions"
            return tuple(self._not_measured(m, MeasurementStatus.NOT_MEASURED, why) for m in CACHE)
        sequence = self._cut(prompt + CACHE_STEPS, 0)
        expected = self.reference.logits(sequence, keep=CACHE_STEPS, pieces=(prompt,))
        self.model.prefill(sequence[None, :prompt], steps=CACHE_STEPS)
        kl = []
        for step in range(CACHE_STEPS):
            logits = self.model.decode(sequence[None, prompt + step : prompt + step + 1])[0, -1]
            require_comparable(logits, expected[step].shape, f"step {step + 1} after {prompt} tokens")
            p, q = log_softmax(expected[step]), log_softmax(logits)
            kl.append(float((np.exp(p) * (p - q)).sum(dtype=np.float64)))
        detail = f"{CACHE_STEPS} steps after {prompt} tokens, the original with the artifact's weights"
        where = self.model.where
        return (
            measured(CACHE[0], float(np.mean(kl)), detail, where),
            measured(CACHE[1], max(kl), detail, where),
        )

    def _narrow(self) -> bool:
        """Whether keys or values are stored in fewer bytes than logits are computed in."""
        interface = self.model.interface
        if interface.static_cache:  # one type for all of it
            return False
        sizes = {s.name: np.dtype(s.dtype).itemsize for s in (*interface.inputs, *interface.outputs)}
        pasts = [name for slot in interface.cache for name in (slot.past_key, slot.past_value)]
        return any(sizes[name] < sizes["logits"] for name in pasts)

    def _alone(self, prompt: int, steps: int, what: str) -> float:
        """Largest difference after a prompt and over some decode steps, batch 1."""
        sequence, expected = self._continued(prompt, steps)
        logits = self.model.prefill(sequence[None, :prompt], steps=steps)
        worst = max_abs(logits[0, -1], expected[0], f"prefill of {prompt} tokens, {what}")
        for step in range(steps):
            logits = self.model.decode(sequence[None, prompt + step : prompt + step + 1])
            place = f"position {prompt + step}, {what}"
            worst = max(worst, max_abs(logits[0, -1], expected[step + 1], place))
        return worst

    def _continued(self, prompt: int, steps: int) -> tuple[Array, Array]:
        """A prompt with `steps` further tokens, and the original's logits from the prompt's last token on."""
        sequence = self._cut(prompt + steps, prompt)
        return sequence, self.reference.logits(sequence, keep=steps + 1, pieces=(prompt,))

    def _beside_switches(self) -> list[tuple[int, int]]:
        """(prompt, steps) where the steps cross a switch, and where the prompt itself ends beyond it."""
        limit = self._limit()
        prompts = [n for at in self.switches for n in (at - SWITCH_STEPS // 2, at + 1) if 0 < n <= limit]
        return [(n, min(SWITCH_STEPS, limit - n)) for n in prompts]

    def _rows(self, lengths: Sequence[int], steps: int) -> Iterator[Row]:
        for i, length in enumerate(lengths):
            tokens = self._cut(length + steps, 31 * i)
            keep = length + steps if self._every() else steps + 1
            yield Row(tokens, self.reference.logits(tokens, keep=keep, pieces=(length,)), length)

    def _cut(self, length: int, offset: int) -> Array:
        """`length` tokens from `offset` on, from the start again after the last."""
        return np.take(self.tokens, np.arange(offset, offset + length), mode="wrap")

    def _limit(self) -> int:
        limit = self.model.interface.max_length
        return 1 << 62 if limit is None else limit

    def _longest(self) -> int:
        """The longest prompt: all positions, or as many as the original's attention has room for."""
        return min(self._limit(), int((SCORE_BYTES / (4 * self.heads)) ** 0.5))

    def _sides(self) -> tuple[str, ...]:
        side = self.model.interface.padding
        return {"any": ("left", "right"), "none": ()}.get(side, (side,))

    def _every(self) -> bool:
        return self.model.interface.logits == "all"

    def _not_measured(self, metric: Metric, status: MeasurementStatus, why: str) -> Measurement:
        return unmeasured(metric, status, why, self.model.where)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(n) for n in numbers)
