"""Compare the artifact's logits with the original's, in prefill, decode and ragged batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.runtime.session import Session
from llmc.validate.coverage import Coverage
from llmc.validate.measure import measure, measured, unmeasured
from llmc.validate.positions import WINDOW_STEPS, Plan, ReferencePass
from llmc.validate.ragged import compare_ragged, row_differences
from llmc.validate.reference import Advance, Reference, quietly
from llmc.validate.stability import LogitDifference

DECODE = (Metric.DECODE_MAX_ABS, Metric.DECODE_TOP1)
#: Number of parts of the context for each of which the report states the largest difference.
PARTS = 16


def prepare_parity(plan: Plan, reference: Reference, advance: Advance = quietly) -> None:
    """Let the original answer everything that the levels will ask of it, so that it can be released.

    Args:
        advance: Called with the number of passes done and their total.
    """
    passes = [reference_pass for reference_pass in plan.all_passes() if len(reference_pass.positions)]
    for done, reference_pass in enumerate(passes, 1):
        reference.logits_at(reference_pass.tokens, reference_pass.positions, pieces=reference_pass.pieces)
        advance(done, len(passes))


@dataclass(frozen=True)
class Parity:
    """The two models, and the positions that are verified.

    Args:
        model: The artifact.
        reference: The original, float32.
        plan: The positions that are verified, from `plan_positions`.
        differences: Differences of all positions compared so far.
    """

    model: Session
    reference: Reference
    plan: Plan
    differences: list[LogitDifference] = field(default_factory=list)
    _coverage: Coverage = field(default_factory=Coverage)

    def measure(self) -> tuple[Measurement, ...]:
        """Measure all levels, each by itself; a level is NaN if the artifact breaks in it."""
        where = self.model.where
        return (
            *measure((Metric.PREFILL_MAX_ABS,), where, self.prefill),
            *measure((Metric.CHUNKS_MAX_ABS, *DECODE), where, self.over_one_cache),
            *measure((Metric.RAGGED_MAX_ABS,), where, self.ragged),
            *measure((Metric.WINDOW_MAX_ABS,), where, self.window),
            self._coverage.measure(self.plan, where),
        )

    def prefill(self) -> tuple[Measurement, ...]:
        """Measure the largest difference over prompts of several lengths, each a run from an empty cache."""
        differences = {}
        for length in self.plan.prompts:
            logits = self.model.prefill(self.plan.tokens[None, :length], steps=0)
            differences[length] = self._compare(
                logits, 0, length, self.plan.history(length), Metric.PREFILL_MAX_ABS
            )
        lengths = sorted(differences)
        detail = f"{len(lengths)} prompts of {_spread(lengths)} tokens, each from an empty cache"
        figures = {f"length_{n}": differences[n] for n in lengths}
        worst = max(differences.values())
        return (measured(Metric.PREFILL_MAX_ABS, worst, detail, self.model.where, figures),)

    def over_one_cache(self) -> tuple[Measurement, ...]:
        """Measure the levels of pieces and of single steps.

        The long sequence is run once in pieces. Its cache is rewound for every further piece and step.
        """
        where, plan = self.model.where, self.plan
        if not plan.pieces:
            why, status = f"the model ends at {plan.limit} positions", MeasurementStatus.NOT_MEASURED
            return tuple(unmeasured(m, status, why, where) for m in (Metric.CHUNKS_MAX_ABS, *DECODE))
        ends = np.cumsum((plan.first, *plan.pieces)).tolist()
        self.model.prefill(plan.tokens[None, : plan.first], steps=len(plan.tokens) - plan.first)
        walked = [(a, b, self.model.decode(plan.tokens[None, a:b])) for a, b in pairwise(ends)]
        state = self.model.state()
        return (
            *measure((Metric.CHUNKS_MAX_ABS,), where, lambda: self._chunks(walked, state)),
            *measure(DECODE, where, lambda: self._decode(state)),
        )

    def _chunks(self, walked: Sequence[tuple[int, int, Array]], state: Any) -> tuple[Measurement, ...]:
        """Measure the largest difference at the ends of pieces of the long sequence, and of further pieces.

        The further pieces have every size of a block, each over the cache of all tokens before it.
        """
        plan, history = self.plan, self.plan.history(self.plan.first)
        by_end = [(b, self._compare(logits, a, b, history, Metric.CHUNKS_MAX_ABS)) for a, b, logits in walked]
        for at, size in plan.turns:
            self.model.rewind(state, at)
            logits = self.model.decode(plan.tokens[None, at : at + size])
            by_end.append((at + size, self._compare(logits, at, at + size, history, Metric.CHUNKS_MAX_ABS)))
        detail = (
            f"{len(plan.tokens):,} tokens, {plan.first:,} at once and the rest in {len(plan.pieces)} pieces; "
            f"{len(plan.turns)} further pieces of {_spread([n for _, n in plan.turns])} tokens, each over "
            "the cache of all tokens before it"
        )
        return (self._worst(Metric.CHUNKS_MAX_ABS, by_end, detail),)

    def _decode(self, state: Any) -> tuple[Measurement, ...]:
        """Measure the largest difference and the share of equal argmax over single steps fed with the text.

        These are steps over the cache of the long sequence, and consecutive ones after a few short prompts.
        """
        plan, equal, by_end = self.plan, list[bool](), list[tuple[int, float]]()
        for at in plan.steps:
            self.model.rewind(state, at)
            value, same = self._step(at, plan.history(plan.first), DECODE[0])
            by_end.append((at + 1, value))
            equal.append(same)
        for prompt, steps in plan.runs:
            self.model.prefill(plan.tokens[None, :prompt], steps=steps)
            for at in range(prompt, prompt + steps):
                value, same = self._step(at, plan.history(prompt), DECODE[0])
                by_end.append((at + 1, value))
                equal.append(same)
        detail = f"steps at {len(plan.steps):,} positions of {_spread(plan.steps)}"
        if plan.runs:
            runs = ", ".join(f"{steps} after {prompt:,}" for prompt, steps in plan.runs)
            detail += f", and consecutive ones: {runs}"
        share = float(np.mean(equal))
        return (
            self._worst(DECODE[0], by_end, detail),
            measured(DECODE[1], share, f"{detail}; {len(equal):,} steps", self.model.where),
        )

    def ragged(self) -> tuple[Measurement, ...]:
        """Measure the largest difference over the real tokens of padded batches, in prefill and decode.

        The original runs each row alone, without padding.
        """
        batches = {i: batch for i, batch in enumerate(self.plan.batches) if batch.window is None}
        if not batches:
            status, why = self.plan.without_batches
            return (unmeasured(Metric.RAGGED_MAX_ABS, status, why, self.model.where),)
        figures: dict[str, float] = {}
        for number, batch in batches.items():
            for side in self.plan.sides or ("left",):
                name = f"{side}_padded" if self.plan.sides else "equal_rows"
                worst = self._batch(number, side, Metric.RAGGED_MAX_ABS)
                figures[name] = max(figures.get(name, 0.0), worst)
            self._coverage.batch(batch)
        lengths = [n for batch in batches.values() for n in batch.prompts]
        first = next(iter(batches.values()))
        padded = (
            f"padded {' and '.join(self.plan.sides)}" if self.plan.sides else "the graph accepts no padding"
        )
        detail = (
            f"{len(batches)} batches of {len(first.prompts)} rows of {_spread(lengths)} tokens and"
            f" {first.steps} steps, {padded}"
        )
        worst = max(figures.values())
        return (measured(Metric.RAGGED_MAX_ABS, worst, detail, self.model.where, figures),)

    def window(self) -> tuple[Measurement, ...]:
        """Measure the largest difference around each sliding window.

        It covers prompts of window - 1, window and window + 1 tokens and beyond, decode that crosses them,
        and a ragged batch with rows on both sides of the window. The windows are those of the interface and
        of the original's config, so that a window that the artifact forgot is measured as well.
        """
        plan = self.plan
        if not plan.windows:
            status, why = plan.without_windows
            return (unmeasured(Metric.WINDOW_MAX_ABS, status, why, self.model.where),)
        figures = {}
        for window, prompts in plan.windows.items():
            for prompt in prompts:
                logits = self.model.prefill(plan.tokens[None, :prompt], steps=WINDOW_STEPS)
                history = plan.history(prompt)
                worst = [self._compare(logits, 0, prompt, history, Metric.WINDOW_MAX_ABS)]
                worst += [
                    self._step(at, history, Metric.WINDOW_MAX_ABS)[0]
                    for at in range(prompt, prompt + WINDOW_STEPS)
                ]
                figures[f"window_{window}_prompt_{prompt}"] = max(worst)
        for number, batch in enumerate(plan.batches):
            if batch.window is not None:
                for side in plan.sides:
                    largest = self._batch(number, side, Metric.WINDOW_MAX_ABS)
                    figures[f"window_{batch.window}_{side}_padded"] = largest
        detail = (
            f"windows of {', '.join(map(str, plan.windows))}: decode across each, prompts beyond each,"
            f" ragged rows padded {' and '.join(self.plan.sides) or 'nowhere'}"
        )
        worst_of_all = max(figures.values())
        return (measured(Metric.WINDOW_MAX_ABS, worst_of_all, detail, self.model.where, figures),)

    @cached_property
    def _answers(self) -> list[dict[int, Array]]:
        """The original's logits (vocabulary,) by position, for each history of the plan."""
        return [dict(zip(q.positions.tolist(), self._ask(q), strict=True)) for q in self.plan.passes()]

    def _ask(self, reference_pass: ReferencePass) -> Array:
        if not len(reference_pass.positions):
            return np.zeros((0, self.plan.vocabulary), np.float32)
        return self.reference.logits_at(
            reference_pass.tokens, reference_pass.positions, pieces=reference_pass.pieces
        )

    def _compare(self, logits: Array, start: int, end: int, history: int, metric: Metric) -> float:
        """Return the largest difference of logits (1, end - start or 1, vocabulary) of a run over start:end.

        A graph that returns every position is compared at all positions that the original was asked for.
        """
        answers = self._answers[history]
        every = self.model.interface.logits == "all"
        positions = [at for at in range(start, end) if at in answers] if every else [end - 1]
        rows = logits[0, [at - start for at in positions]] if every else logits[0]
        expected = np.stack([answers[at] for at in positions])
        differences = row_differences(rows, expected, f"{metric}: tokens {start} to {end}")
        self._coverage.add(positions, end)
        self._add(metric, history, 0, positions, differences)
        return float(differences.max())

    def _step(self, at: int, history: int, metric: Metric) -> tuple[float, bool]:
        """Return the largest difference after one more token, and whether the argmax is the same."""
        logits = self.model.decode(self.plan.tokens[None, at : at + 1])
        worst = self._compare(logits, at, at + 1, history, metric)
        return worst, int(logits[0, -1].argmax()) == int(self._answers[history][at].argmax())

    def _batch(self, number: int, side: str, metric: Metric) -> float:
        """Return the largest difference over a batch of the plan, padded on one side."""
        batch, worst = self.plan.batches[number], 0.0
        expected = self._ask(batch.reference_pass)
        for row, positions, differences in compare_ragged(self.model, batch, expected, side):
            self._add(metric, len(self.plan.switches) + 1 + number, row, positions.tolist(), differences)
            worst = max(worst, float(differences.max()))
        return worst

    def _add(
        self, metric: Metric, reference_pass: int, row: int, positions: Sequence[int], values: Array
    ) -> None:
        self.differences.extend(
            LogitDifference(metric, reference_pass, row, int(at), float(value))
            for at, value in zip(positions, values, strict=True)
        )

    def _worst(self, metric: Metric, by_end: Sequence[tuple[int, float]], detail: str) -> Measurement:
        """Return the largest of differences by total length, and the largest in each part of the context."""
        total, figures = len(self.plan.tokens), dict[str, float]()
        width = max(1, -(-total // PARTS))
        for end, value in sorted(by_end):
            part = (end - 1) // width
            name = f"tokens_{part * width + 1}_to_{min(total, (part + 1) * width)}"
            figures[name] = max(figures.get(name, 0.0), value)
        return measured(metric, max(figures.values()), detail, self.model.where, figures)


def _spread(numbers: Sequence[int]) -> str:
    return f"{min(numbers):,} to {max(numbers):,}" if numbers else "no"
