"""The parity levels of a tiny model, as the gate plans them."""

from typing import Any

import numpy as np

from llmc.runtime.session import Session
from llmc.validate.costs import Costs
from llmc.validate.drawing import BUDGET, Ground, plan_positions
from llmc.validate.parity import Parity
from llmc.validate.positions import Plan
from llmc.validate.reference import Reference

TINY = Costs(parameters=100_000, scores=8, width=16, cache_bytes=512)


def plan_of(
    interface: Any, tokens: np.ndarray, *, seed: int = 0, budget: float = BUDGET, **facts: Any
) -> Plan:
    """A plan for a model of the sizes of `TINY`."""
    ground = Ground(**{"interface": interface, "text": tokens, "costs": TINY, **facts})
    return plan_positions(ground, seed, budget)


def parity_of(model: Session, reference: Reference, tokens: np.ndarray, **facts: Any) -> Parity:
    """All levels of `model` against `reference`."""
    window = getattr(reference, "window", None)
    return Parity(model, reference, plan_of(model.interface, tokens, **{"window": window, **facts}))
