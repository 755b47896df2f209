"""Mixed precision solved: one scheme for every matrix, within a budget of bits or of predicted KL divergence.

A multiple-choice knapsack, by SciPy's mixed-integer solver (HiGHS).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.config import WeightScheme
from llmc.errors import ConfigError

#: Relative gap to the best allocation at which the solver may stop.
_GAP = 1e-4
#: Seconds that it may take.
_SECONDS = 60.0


@dataclass(frozen=True)
class Candidate:
    """One way to store a matrix.

    Args:
        bytes: All that is stored for it.
        kl: Predicted KL divergence that it costs, nats per token.
    """

    scheme: WeightScheme
    bytes: int
    kl: float


def allocate(
    candidates: Mapping[str, Sequence[Candidate]],
    *,
    most_bytes: float | None = None,
    most_kl: float | None = None,
) -> dict[str, Candidate]:
    """The least predicted KL divergence within `most_bytes`, or the fewest bytes within `most_kl`.

    Args:
        candidates: At least one for each matrix.

    Raises:
        ConfigError: No allocation stays within the bound; says the nearest.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = [(i, c) for i, each in enumerate(candidates.values()) for c in each]
    sizes = np.array([c.bytes for _, c in flat], float)
    prices = np.array([c.kl for _, c in flat])
    if most_bytes is not None:
        goal, spent, bound, unit = prices, sizes, most_bytes, "bytes"
    else:
        goal, spent, bound, unit = sizes, prices, most_kl or 0.0, "nats per token"
    least = sum(min(_spent(c, unit) for c in each) for each in candidates.values())
    if least > bound:
        raise ConfigError(
            f"no allocation stays within {bound:.6g} {unit}; the nearest needs {least:.6g}",
            hint="raise the bound, or add choices",
        )
    one_each = np.zeros((len(candidates), len(flat)))
    one_each[[i for i, _ in flat], range(len(flat))] = 1
    scale = max(bound, 1e-12)
    result = milp(
        goal / max(goal.max(), 1e-30),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(spent[None] / scale, -math.inf, 1)],
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if result.x is None:
        raise ConfigError(
            f"no allocation was found in {_SECONDS:.0f} s: {result.message}", hint="give fewer choices"
        )
    chosen = [c for (_, c), taken in zip(flat, result.x, strict=True) if taken > 0.5]
    return dict(zip(candidates, chosen, strict=True))


def _spent(candidate: Candidate, unit: str) -> float:
    return candidate.bytes if unit == "bytes" else candidate.kl
