"""Describe the positions that the parity levels verify, as data: one artifact has one plan.

Most comparisons share one long sequence of text. What follows its first p tokens does not depend on how they
were cut into steps, so that one pass of the original gives the logits for prompts of any length, for pieces
over a cache of any length and for single steps anywhere. Only a rotary embedding that switches makes a
difference: a step that begins beyond a switch sees keys that were rotated by other frequencies. A plan has
one pass of the original for each such history.

Batches have sequences of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from llmc.arrays import Array
from llmc.artifact.manifest import FileDigest
from llmc.artifact.verdict import MeasurementStatus

#: Number of single steps after each prompt around a sliding window.
WINDOW_STEPS = 6


def seed_of(files: Mapping[str, FileDigest]) -> int:
    """Derive the seed of an artifact, below 2**32, from the digests of its files."""
    lines = "\n".join(f"{name} {file.sha256}" for name, file in sorted(files.items()))
    return int(sha256(lines.encode()).hexdigest()[:8], 16)


@dataclass(frozen=True)
class ReferencePass:
    """The input of one pass of the original.

    Args:
        tokens: (sequence,) or (rows, sequence) int64.
        pieces: Numbers of tokens of its steps over one KV cache; empty for a single step.
        positions: (n,) int64, ascending; the logits after each are requested.
    """

    tokens: Array
    pieces: tuple[int, ...]
    positions: Array


@dataclass(frozen=True)
class PromptBatch:
    """The prompts that are run as one padded batch, and the steps after them.

    Args:
        tokens: (rows, sequence) int64: each row's prompt and the tokens of its steps, followed by any tokens.
        prompts: Length of each row's prompt.
        steps: Number of steps that follow.
        window: The sliding window that the lengths lie around; None if they are random.
    """

    tokens: Array
    prompts: tuple[int, ...]
    steps: int
    window: int | None = None

    @property
    def reference_pass(self) -> ReferencePass:
        """The pass of the original over every row's last prompt token and its steps."""
        positions = {at for n in self.prompts for at in range(n - 1, n + self.steps)}
        return ReferencePass(self.tokens, (), np.array(sorted(positions), np.int64))


@dataclass(frozen=True)
class Plan:
    """The complete list of positions that the levels verify.

    Args:
        seed: The seed of the random generator.
        budget: Seconds of the forecast for which the plan was drawn.
        tokens: (n,) int64, the long sequence.
        limit: Positions of the model; None for any number.
        switches: Lengths within the long sequence beyond which the original computes differently.
        prompts: Lengths of prompts that are run from an empty cache.
        first: Number of tokens of the long sequence that are run at once; `pieces` follow.
        pieces: Sizes of the pieces that come after, up to the end.
        turns: (position, size) of further pieces over the cache of all tokens before the position.
        steps: Positions whose token is run alone over the cache of all tokens before it.
        runs: (prompt, steps): consecutive single steps after a prompt.
        windows: Sliding windows within the long sequence, and prompts around each.
        unreached: Sliding windows and other lengths that the budget does not reach.
        batches: Ragged batches; empty if the model accepts only one row.
        cache_steps: Single steps at the end of the long sequence, where attention rounds as it is served.
        vocabulary: Number of token ids.
        sides: Sides on which the rows of a batch may be padded; empty if they must be of equal length.
        without_batches, without_windows: Status and reason if there are no batches or windows.
    """

    seed: int
    budget: float
    tokens: Array
    limit: int | None
    switches: tuple[int, ...]
    prompts: tuple[int, ...]
    first: int
    pieces: tuple[int, ...]
    turns: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    windows: Mapping[int, tuple[int, ...]]
    unreached: tuple[int, ...]
    batches: tuple[PromptBatch, ...]
    cache_steps: int
    vocabulary: int
    sides: tuple[str, ...]
    without_batches: tuple[MeasurementStatus, str]
    without_windows: tuple[MeasurementStatus, str]

    def history(self, first: int) -> int:
        """Return the number of the pass that answers for steps of which the first has `first` tokens."""
        return sum(1 for at in self.switches if first > at)

    def passes(self) -> list[ReferencePass]:
        """Return the passes over the long sequence, by history."""
        requested: list[set[int]] = [set() for _ in range(len(self.switches) + 1)]
        for length in self.prompts:
            requested[self.history(length)].add(length - 1)
        ends = np.cumsum((self.first, *self.pieces)) - 1
        last = range(len(self.tokens) - self.cache_steps, len(self.tokens))
        walked = requested[self.history(self.first)]
        walked.update((*ends.tolist(), *(at + size - 1 for at, size in self.turns), *self.steps, *last))
        alone = [(p, WINDOW_STEPS) for prompts in self.windows.values() for p in prompts]
        for prompt, steps in (*self.runs, *alone):
            requested[self.history(prompt)].update(range(prompt - 1, prompt + steps))
        bounds = (*self.switches, len(self.tokens))
        return [
            ReferencePass(
                self.tokens, tuple(np.diff((0, *bounds[i:])).tolist()), np.array(sorted(at), np.int64)
            )
            for i, at in enumerate(requested)
        ]

    @property
    def runs_of_levels(self) -> int:
        """The number of runs of the artifact by the levels; each prefill, piece, step or batch is one."""
        after = len(self.turns) + len(self.steps) + sum(1 + steps for _, steps in self.runs)
        walked = 1 + len(self.pieces) + after if self.pieces else 0
        alone = sum(len(prompts) for prompts in self.windows.values()) * (1 + WINDOW_STEPS)
        sides = len(self.sides)
        ragged = sum(
            (1 + batch.steps) * (max(1, sides) if batch.window is None else sides) for batch in self.batches
        )
        return len(self.prompts) + walked + alone + ragged

    @property
    def runs_of_cache(self) -> int:
        """The maximum number of runs of the artifact that measure what attention loses as it is served."""
        return 1 + len(self.pieces) + self.cache_steps

    def all_passes(self) -> list[ReferencePass]:
        """Return all passes of the original: those over the long sequence, and one for each batch."""
        return [*self.passes(), *(batch.reference_pass for batch in self.batches)]
