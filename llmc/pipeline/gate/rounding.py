"""Provide the original with plainly rounded weights, the yardstick for a quantized artifact's quality."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmc.config import Metric, Target
from llmc.validate.reference import TorchModel
from llmc.validate.stability import allow_rounding

if TYPE_CHECKING:
    from llmc.artifact.manifest import WeightRecord
    from llmc.artifact.verdict import Measurement
    from llmc.checkpoint import Checkpoint
    from llmc.graph.weights import Rows
    from llmc.pipeline.gate.subject import Subject
    from llmc.validate.parity import Parity
    from llmc.validate.remembered import RememberedModel
    from llmc.validate.yardstick import Rounding


def plan_roundings(
    target: Target, weights: Sequence[WeightRecord], sources: Mapping[str, Rows]
) -> dict[str, Rounding]:
    """Plan for the yardstick how to round each matrix that the artifact stores as integers in blocks.

    Returns:
        The plan; empty if the target has no gate on it.
    """
    from llmc.validate.yardstick import Rounding

    if all(gate.metric is not Metric.TEXT_KL_RATIO for gate in target.gates):
        return {}
    return {
        record.name: Rounding(record.bits, record.block_size, bool(record.symmetric), record.shape[-2])
        for record in weights
        if record.block_size is not None and record.name in sources
    }


def digest_roundings(roundings: Mapping[str, Rounding]) -> str:
    """Return the sha256 (hex) of the plan, for the cache of the yardstick's results."""
    lines = [f"{name} {rounding}" for name, rounding in sorted(roundings.items())]
    return hashlib.sha256("\n".join(["rounded", *lines]).encode()).hexdigest()


def load_rounded(
    loaded: TorchModel | None,
    checkpoint: Checkpoint,
    sources: Mapping[str, Rows],
    roundings: Mapping[str, Rounding],
) -> TorchModel:
    """Return the model of `checkpoint` with rounded matrices: in `loaded` if given, otherwise streamed."""
    from llmc.validate.weights import StoredParameters, parameters
    from llmc.validate.yardstick import round_weights

    rows = {name: sources[name] for name in roundings}
    rounded = round_weights(rows, roundings)
    if loaded is None:
        return TorchModel(checkpoint.stream_reference(StoredParameters(rows, rounded)))
    for name, matrix in rounded.items():
        loaded.set_parameters(dict(parameters(rows[name], matrix.whole())))
    return loaded


def allow_own_rounding(
    subject: Subject,
    own: RememberedModel,
    parity: Parity,
    levels: Sequence[Measurement],
    large: bool,
) -> tuple[Measurement, ...]:
    """Return the parity levels; levels that miss their bound allow for the original's own rounding.

    Args:
        own: The original with the artifact's weights.
        parity: The object that measured the levels.
        large: Whether the original is streamed, so that each question costs a pass over its weights.
    """
    if large:
        return tuple(levels)
    bounds = {gate.metric: gate.max for gate in subject.target.gates if gate.max is not None}
    return allow_rounding(levels, bounds, parity.differences, parity.plan.all_passes(), own)


def bound_on_divergence(
    subject: Subject, original: RememberedModel, large: bool
) -> tuple[RememberedModel, float] | None:
    """Return the original and the bound on mean KL divergence, to find what rounding alone moves by more.

    Args:
        large: Whether the original is streamed, so that each question costs a pass over its weights.
    """
    bounds = [gate.max for gate in subject.target.gates if gate.metric is Metric.TEXT_KL_MEAN]
    return None if large or not bounds or bounds[0] is None else (original, bounds[0])
