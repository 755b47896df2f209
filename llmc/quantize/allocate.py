"""Solve mixed precision: choose a scheme for every matrix within a budget of bits or of predicted divergence.

This is a multiple-choice knapsack problem, solved by SciPy's mixed-integer solver (HiGHS).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.config import WeightScheme
from llmc.errors import ConfigError

#: Relative gap to the best allocation at which the solver may stop.
_GAP = 1e-4
#: Time limit of the solver in seconds.
_SECONDS = 60.0


@dataclass(frozen=True)
class PricedScheme:
    """The scheme, size and predicted loss of one way to store a matrix.

    Args:
        bytes: Bytes of everything that is stored for it.
        kl: Predicted increase of the KL divergence, nats per token.
    """

    scheme: WeightScheme
    bytes: int
    kl: float


def allocate(
    candidates: Mapping[str, Sequence[PricedScheme]],
    *,
    most_bytes: float | None = None,
    most_kl: float | None = None,
) -> dict[str, PricedScheme]:
    """Minimize the predicted KL divergence within `most_bytes`, or the bytes within `most_kl`.

    Args:
        candidates: The ways to store each matrix, at least one for each.

    Raises:
        ConfigError: No allocation stays within the bound; the message states the nearest.
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


def _spent(candidate: PricedScheme, unit: str) -> float:
    return candidate.bytes if unit == "bytes" else candidate.kl
