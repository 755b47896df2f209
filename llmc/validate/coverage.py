"""Record which positions of a context were compared, so that a verdict states what it is based on."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from llmc.artifact.verdict import Measurement
from llmc.config import Metric
from llmc.validate.measure import measured
from llmc.validate.positions import Plan, PromptBatch


@dataclass
class Coverage:
    """The positions and token ids compared so far.

    Args:
        positions: Positions whose own logits were compared.
        reached: Length in tokens of the longest context of a compared logit.
    """

    positions: set[int] = field(default_factory=set)
    reached: int = 0
    _ids: set[int] = field(default_factory=set)

    def add(self, positions: Iterable[int], end: int) -> None:
        """Count `positions` of one sequence, compared in a run that ends before `end`."""
        self.positions.update(positions)
        self.reached = max(self.reached, end)

    def batch(self, batch: PromptBatch) -> None:
        """Count the token ids of a batch that was compared."""
        for row, prompt in zip(batch.tokens, batch.prompts, strict=True):
            self._ids.update(row[: prompt + batch.steps].tolist())

    def measure(self, plan: Plan, where: str) -> Measurement:
        """Measure how far the contexts of compared logits reach, and how many logits were compared."""
        limit = plan.limit
        ids = self._ids | set(np.unique(plan.tokens[: self.reached]).tolist())
        parts = [
            f"{self.reached:,} of {limit:,}" if limit is not None else f"{self.reached:,}",
            f"logits compared at {len(self.positions):,} of them",
            f"{len(ids):,} of {plan.vocabulary:,} token ids in the input",
            f"drawn with seed {plan.seed} for a budget of {plan.budget:g} s",
        ]
        if limit is not None and self.reached < limit:
            parts.append(f"not measured: positions from {self.reached:,} on")
        if plan.unreached:
            parts.append(f"not measured around {', '.join(f'{n:,}' for n in plan.unreached)}")
        figures = {"compared": float(len(self.positions)), "token_ids": float(len(ids)), "seed": plan.seed}
        if limit is not None:
            figures["context"] = float(limit)
        return measured(Metric.POSITIONS, float(self.reached), "; ".join(parts), where, figures)
