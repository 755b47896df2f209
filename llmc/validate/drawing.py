"""Draw the positions that the parity levels verify, over the whole context.

A seed decides where and a budget of time decides how densely; neither depends on the machine at hand, so that
an artifact is verified at the same positions everywhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.arrays import Array
from llmc.artifact.verdict import MeasurementStatus
from llmc.errors import ConfigError
from llmc.graph.interface import Interface
from llmc.validate.costs import Costs, bits_of
from llmc.validate.positions import WINDOW_STEPS, Plan, PromptBatch

#: Seconds, as forecast by `Costs`, that the levels may take on both sides.
BUDGET = 80.0
#: Shares of the budget: for the original over the long sequence and over batches; for the artifact over the
#: long sequence, prompts, single steps, later pieces and batches.
LONG_ORIGINAL, BATCH_ORIGINAL = 0.44, 0.04
LONG, PROMPTS, STEPS, TURNS, BATCHES = 0.25, 0.03, 0.05, 0.03, 0.04
#: Maximum bytes of the original's logits that a plan requests.
LOGIT_BYTES = 192 << 20
#: Maximum bytes of logits that one run of the artifact returns.
RUN_BYTES = 1 << 30
#: The long sequence has at least this many tokens, if the model has as many positions.
LEAST_LONG = 640
#: Length of the long sequence at most where a model has no bound on positions.
MOST_UNBOUNDED = 8_192
#: Lengths of the prompts that are run for every model.
FIXED_PROMPTS = (1, 2, 17, 128)
#: Numbers of tokens around which kernels change: every size of a small block, and the edges of larger ones.
SIZES = (8, 16, 4, 2, *(n for n in range(3, 16) if n not in (4, 8)), 32, 31, 33, 64, 63, 65, 128, 127, 129)
#: Maximum number of prompts, later pieces and batches that are drawn.
MOST_PROMPTS, MOST_TURNS, MOST_BATCHES = 96, 256, 16
#: Minimum number of steps and later pieces that are drawn.
LEAST_STEPS, LEAST_TURNS = 24, 12
#: Number of last positions of the context, each of which is verified.
END = 8
#: Steps after a short prompt, which show a cache that drifts: if the budget is large, and if it is small.
RUN_STEPS, SHORT_RUN_STEPS = 64, 12
#: Maximum number of tokens of a piece of the long sequence.
PIECE = 1024
#: Rows of a batch, and the number of steps that follow its prompts.
ROWS, ROW_STEPS = 4, 6
#: Tokens of the longest prompt of the batch that is run for every model.
SHORT_ROWS = 20
#: Maximum number of tokens by which a prompt exceeds a sliding window.
WINDOW_EXCESS = 64
#: Single steps at the end of the long sequence, which show the rounding of attention.
CACHE_STEPS = 128


@dataclass(frozen=True)
class Ground:
    """The model and the settings for which positions are drawn.

    Args:
        interface: The inputs and outputs of the artifact.
        text: (n,) int64, tokens of a text, repeated where more are needed.
        costs: The forecast of what runs cost.
        window: The original's sliding window.
        switches: Lengths beyond which the original computes differently; both sides of each are verified.
        lengths: Further lengths to verify around.
        rows: Maximum number of rows of a batch that the artifact accepts; None for any number.
        compiled: Whether compiled kernels compute attention.
        padding: Token that is not drawn, since the original counts no position for it; None for none.
    """

    interface: Interface
    text: Array
    costs: Costs
    window: int | None = None
    switches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    rows: int | None = None
    compiled: bool = False
    padding: int | None = None

    @property
    def limit(self) -> int:
        """The number of positions of the model."""
        return self.interface.max_length or 1 << 20

    @property
    def windows(self) -> list[int]:
        """The sliding windows of the interface and of the original, so that a forgotten one counts."""
        stated = {slot.window for slot in self.interface.cache} | {self.window}
        return sorted(w for w in stated if w is not None and w < self.limit)

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides on which the rows of a batch may be padded."""
        side = self.interface.padding
        return {"any": ("left", "right"), "none": ()}.get(side, (side,))

    @property
    def rounds_attention(self) -> bool:
        """Whether attention rounds keys and values, or stores them in fewer bytes than logits."""
        if self.compiled:
            return True
        if self.interface.static_cache:  # the whole graph has one type
            return False
        specs = (*self.interface.inputs, *self.interface.outputs)
        sizes = {spec.name: bits_of(spec.dtype) for spec in specs}
        pasts = [name for slot in self.interface.cache for name in slot.pasts]
        return any(sizes[name] < sizes["logits"] for name in pasts)


def plan_positions(ground: Ground, seed: int, budget: float = BUDGET) -> Plan:
    """Draw the positions that the levels verify.

    Args:
        seed: The seed of the random generator; one seed gives one plan.
        budget: Seconds of the forecast of `Costs`, for both sides together.

    Raises:
        ConfigError: There are fewer than two tokens of text.
    """
    if len(ground.text) < 2:
        raise ConfigError(
            f"parity was given {len(ground.text)} tokens, too few for a prompt", hint="use a longer text"
        )
    return _Planner(ground, np.random.default_rng(seed), seed, budget).plan()


@dataclass(frozen=True)
class _Planner:
    ground: Ground
    rng: np.random.Generator
    seed: int
    budget: float

    def plan(self) -> Plan:
        ground, rng = self.ground, self.rng
        total = self._long()
        start = int(rng.integers(len(ground.text)))
        tokens = np.take(ground.text, np.arange(start, start + total), mode="wrap")
        switches = tuple(at for at in ground.switches if at < total)
        first = int(rng.integers(max(1, total // 8), max(2, 3 * total // 4)))
        if switches:
            first = min(first, switches[0])
        windows = {w: self._around(w, total) for w in ground.windows if w + WINDOW_STEPS < total}
        unreached = {*ground.windows, *ground.switches, *ground.lengths} - {*windows}
        return Plan(
            seed=self.seed,
            budget=self.budget,
            tokens=tokens,
            limit=ground.interface.max_length,
            switches=switches,
            prompts=self._prompts(total),
            first=first,
            pieces=self._pieces(first, total, switches),
            turns=self._turns(total, switches),
            steps=self._steps(total, switches),
            runs=self._runs(total, switches),
            windows=windows,
            unreached=tuple(sorted(at for at in unreached if total <= at < ground.limit)),
            batches=self._batches(switches[0] if switches else total),
            cache_steps=self._cache_steps(total),
            vocabulary=ground.interface.vocabulary,
            sides=ground.sides,
            without_batches=_without_batches(ground),
            without_windows=_without_windows(ground),
        )

    def _long(self) -> int:
        """Return the length of the long sequence: all positions of the model, if the budget allows."""
        ground, costs = self.ground, self.ground.costs
        around = (*ground.windows, *ground.switches)
        least = max(LEAST_LONG, *(at + min(at // 2, WINDOW_EXCESS) + WINDOW_STEPS + 2 for at in (0, *around)))
        low = min(least, ground.limit)
        high = ground.limit if ground.interface.max_length is not None else max(low, MOST_UNBOUNDED)
        if ground.interface.logits == "all":  # a run returns the logits of each of its tokens
            high = max(low, min(high, RUN_BYTES // (4 * ground.interface.vocabulary)))
        while low < high:
            middle = (low + high + 1) // 2
            passes = 1 + sum(1 for at in ground.switches if at < middle)
            fits = passes * costs.original(middle) <= LONG_ORIGINAL * self.budget
            if fits and costs.run(middle) <= LONG * self.budget:
                low = middle
            else:
                high = middle - 1
        return low

    def _prompts(self, total: int) -> tuple[int, ...]:
        """Draw prompt lengths: fixed ones, both sides of every switch, then random ones up to their share."""
        ground, rng = self.ground, self.rng
        sides = {at + by for at in ground.switches for by in (0, 1)}
        chosen = {n for n in (*FIXED_PROMPTS, *sides) if n <= total}
        left = PROMPTS * self.budget - sum(self.ground.costs.run(n) for n in chosen)
        count = max(1, min(MOST_PROMPTS // 2, total // 8, self._room() // 16))
        lengths = [at + by for at in (*ground.lengths, total) for by in (-1, 0, 1)]
        spread = rng.permutation(_strata(rng, 1, total, count)).tolist()
        grown = [int(np.exp(x)) for x in rng.permutation(_strata(rng, 0.0, np.log(total + 1), count))]
        sizes = rng.permutation(SIZES).tolist()
        drawn = [n for group in zip(*_cycled(spread, grown, sizes), strict=True) for n in group]
        for length in (*drawn, *lengths):
            cost = self.ground.costs.run(length) if 0 < length <= total else left + 1
            if length not in chosen and cost <= left:
                chosen.add(length)
                left -= cost
        return tuple(sorted(chosen))

    def _pieces(self, first: int, total: int, switches: Sequence[int]) -> tuple[int, ...]:
        """Draw at least four pieces up to the end; none of them lies on both sides of a switch."""
        pieces, at = [], first
        most = max(2, min(PIECE, (total - first) // 4))
        while at < total:
            size = int(np.exp(self.rng.uniform(np.log(2), np.log(most + 1))))
            end = min(at + size, total, *(s for s in switches if s > at))
            pieces.append(end - at)
            at = end
        return tuple(pieces)

    def _turns(self, total: int, switches: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Draw pieces of every size of a block, at positions that are spread over the context."""
        if total < 3:
            return ()
        cost = self.ground.costs.run(max(SIZES) // 4, total // 2)
        most = min(MOST_TURNS, total // 2, self._room() // 8)
        count = max(LEAST_TURNS, min(most, int(TURNS * self.budget / cost)))
        sizes = [*self.rng.permutation(SIZES[:4]), *self.rng.permutation(SIZES[4:])]
        chosen = set()
        for i, at in enumerate(self.rng.permutation(_strata(self.rng, 1, total, count)).tolist()):
            size = int(sizes[i % len(sizes)])
            at = min(at, total - size)
            if at > 0 and not any(at < s < at + size for s in switches):
                chosen.add((at, size))
        return tuple(sorted(chosen))

    def _steps(self, total: int, switches: Sequence[int]) -> tuple[int, ...]:
        """Draw positions of steps: all if the budget allows, else one in each of equal parts, and edges."""
        if total < 2:
            return ()
        cost = self.ground.costs.run(1, total // 2)
        most = min(total - 1, self._room() // 4)
        count = max(min(LEAST_STEPS, total - 1), min(most, int(STEPS * self.budget / cost / 1.5)))
        if count >= total - 1:
            return tuple(range(1, total))
        around = (*self.ground.windows, *switches, *self.ground.lengths)
        edges = {at + by for at in around for by in (-1, 0, 1)}
        drawn = _strata(self.rng, 1, total, count)
        if total >= 16 * count:  # all residues of the largest small block
            drawn += np.resize(self.rng.permutation(16), count) - drawn % 16
        chosen = {*drawn.tolist(), *edges, *range(total - END, total)}
        return tuple(sorted(at for at in chosen if 0 < at < total))

    def _runs(self, total: int, switches: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Draw a few short prompts with the steps after them, and one prompt beyond each switch."""
        one = self.ground.costs.run(1, 64)
        steps = RUN_STEPS if 3 * RUN_STEPS * one <= STEPS * self.budget else SHORT_RUN_STEPS
        steps = min(steps, total // 2)
        prompts = {1, int(self.rng.integers(2, 33)), int(self.rng.integers(33, 161))}
        runs = [(n, steps) for n in sorted(prompts) if n + steps <= total and steps]
        return (*runs, *((at + 1, min(2, total - at - 1)) for at in switches))

    def _cache_steps(self, total: int) -> int:
        """Return the number of steps at the end that show what attention loses as it is served."""
        if not self.ground.rounds_attention:
            return 0
        fits = CACHE_STEPS * self.ground.costs.run(1, total) <= STEPS * self.budget
        return min(CACHE_STEPS if fits else CACHE_STEPS // 4, total - 1)

    def _around(self, window: int, total: int) -> tuple[int, ...]:
        beyond = window + 1 + min(window // 2, WINDOW_EXCESS)
        stated = {window - 2, window - 1, window, window + 1, beyond}
        return tuple(sorted({min(max(1, n), total - WINDOW_STEPS) for n in stated}))

    def _batches(self, total: int) -> tuple[PromptBatch, ...]:
        """Draw batches until the input has held the whole vocabulary or their share is spent."""
        rows = min(ROWS, self.ground.rows or ROWS)
        if rows < 2:
            return ()
        least = 3 if self.ground.rows is None or self.ground.rows > 2 else rows
        ids = _Ids(self.rng, self.ground.interface.vocabulary, self.ground.padding)
        short, steps = min(SHORT_ROWS, total - ROW_STEPS), ROW_STEPS
        if short < least:
            return ()
        batches = [self._batch(ids, rows, short, steps)]
        for window in self.ground.windows if self.ground.sides else ():
            lengths = [max(2, window - 1), window + 3, max(2, window // 2), window + 1][:rows]
            if max(lengths) + WINDOW_STEPS <= total and self._affords(max(lengths), rows, 1.0):
                batches.append(self._filled(ids, lengths, WINDOW_STEPS, window))
        longest, left = total - ROW_STEPS, 1.0
        while longest > short and not self._affords(longest, rows, 0.5):
            longest = longest * 3 // 4
        while (
            len(batches) < MOST_BATCHES
            and left > 0
            and (ids.left > 0 or len(batches) < 3)
            and longest > short
        ):
            batches.append(self._batch(ids, rows, longest, ROW_STEPS))
            left -= 0.5 if not self._affords(longest, rows, 0.1) else 0.1
        return tuple(batches)

    def _affords(self, length: int, rows: int, share: float) -> bool:
        """Return whether one batch takes at most `share` of the budget for batches, on either side."""
        costs = self.ground.costs
        sides = len(self.ground.sides) or 1
        runs = sides * (costs.run(length, rows=rows) + ROW_STEPS * costs.run(1, length, rows))
        asked = costs.original(length, rows)
        return runs <= share * BATCHES * self.budget and asked <= share * BATCH_ORIGINAL * self.budget

    def _batch(self, ids: "_Ids", rows: int, longest: int, steps: int) -> PromptBatch:
        """Draw a batch with a row of `longest` tokens and others of random lengths, or equal if need be."""
        lengths = [longest, *self.rng.integers(1, longest + 1, rows - 1).tolist()]
        if self.ground.interface.padding == "none":
            lengths = [longest] * rows
        return self._filled(ids, self.rng.permutation(lengths).tolist(), steps)

    def _filled(
        self, ids: "_Ids", lengths: Sequence[int], steps: int, window: int | None = None
    ) -> PromptBatch:
        tokens = np.zeros((len(lengths), max(lengths) + steps), np.int64)
        for row, length in zip(tokens, lengths, strict=True):
            row[:] = np.resize(ids.draw(length + steps), row.shape)
        return PromptBatch(tokens, tuple(lengths), steps, window)

    def _room(self) -> int:
        """Return how many positions' logits may be requested."""
        return max(64, LOGIT_BYTES // (4 * self.ground.interface.vocabulary))


def _without_batches(ground: Ground) -> tuple[MeasurementStatus, str]:
    if ground.rows == 1:
        return MeasurementStatus.NOT_APPLICABLE, "the artifact accepts one row at a time"
    why = f"the model ends at {ground.limit} positions, so that three rows do not fit"
    return MeasurementStatus.NOT_MEASURED, why


def _without_windows(ground: Ground) -> tuple[MeasurementStatus, str]:
    if ground.windows:
        why = f"window {ground.windows[0]} and the steps after it do not fit into {ground.limit} positions"
        return MeasurementStatus.NOT_MEASURED, why
    stated = sorted({s.window for s in ground.interface.cache if s.window} | {ground.window or 0} - {0})
    windows = ", ".join(map(str, stated))
    why = f"window {windows} never ends within {ground.limit} positions" if windows else "no sliding window"
    return MeasurementStatus.NOT_APPLICABLE, why


class _Ids:
    """The token ids but one in a random order, which repeats after the last."""

    def __init__(self, rng: np.random.Generator, vocabulary: int, but: int | None) -> None:
        order = rng.permutation(vocabulary)
        self._order = order[order != but] if but is not None else order
        self._at = 0

    @property
    def left(self) -> int:
        """The number of ids that were not drawn yet."""
        return len(self._order) - self._at

    def draw(self, count: int) -> Array:
        """Draw (count,) int64."""
        ids = np.take(self._order, np.arange(self._at, self._at + count), mode="wrap")
        self._at += count
        return ids


def _strata(rng: np.random.Generator, low: float, high: float, count: int) -> Array:
    """Draw one number in each of `count` equal parts of [low, high); integers if `low` is an integer."""
    edges = np.linspace(low, high, count + 1)
    drawn = rng.uniform(edges[:-1], edges[1:])
    return drawn.astype(np.int64) if isinstance(low, int) else drawn


def _cycled(*series: Sequence[int]) -> Iterable[list[int]]:
    """Repeat shorter series from their beginning up to the length of the longest."""
    length = max(len(s) for s in series)
    return [[s[i % len(s)] for i in range(length)] for s in series]
