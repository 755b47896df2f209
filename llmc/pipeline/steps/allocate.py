"""Allocate bits within a build: estimate each matrix's loss on calibration text, then choose its bits."""

from __future__ import annotations

from dataclasses import dataclass
from glob import escape
from typing import TYPE_CHECKING

from llmc.config import Allocation, Dtype, Quantization, WeightRule, WeightScheme
from llmc.errors import ConfigError
from llmc.pipeline.steps.calibrate import prepare, walking
from llmc.progress import Progress
from llmc.quantize.allocate import PricedScheme, allocate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmc.arrays import Array
    from llmc.checkpoint import Checkpoint
    from llmc.graph.model import Graph
    from llmc.quantize.blocks import ScaleType
    from llmc.quantize.linear import MatrixPlan


@dataclass(frozen=True)
class _Share:
    """The part of the model that an allocation does not decide on."""

    bytes: int
    elements: int


def allocate_bits(
    checkpoint: Checkpoint,
    graph: Graph,
    quantization: Quantization,
    dtype: Dtype,
    progress: Progress,
    joined: Sequence[Sequence[str]] = (),
) -> Quantization:
    """Return the rules preceded by one for each matrix that the allocation decides on.

    It decides on linear layers that the rules quantize. Matrices that rules leave in float, separate
    embeddings and experts stay as the rules say; their bytes count. Matrices that keep the checkpoint's codes
    are not part of the budget; if all do, there is nothing to decide.

    Args:
        joined: Names of matrices that the runtime joins, so that they need one scheme.

    Raises:
        ConfigError: No allocation stays within the bound, or there is too little text.
        CheckpointError: Weights, activations or gradients are not finite.
        UnsupportedError: The model cannot be run layer by layer.
    """
    import numpy as np

    from llmc.quantize.linear import plan_matrices, scale_type

    allocation = quantization.allocation
    if allocation is None:
        return quantization
    kind = scale_type(quantization, dtype)
    scale_bytes = np.dtype(kind).itemsize
    plans = plan_matrices(graph, quantization, dtype)
    if any(plan.kept for plan in plans) and not any(_is_open(plan) and plan.scheme for plan in plans):
        progress.note("allocate: nothing to decide, all matrices keep the checkpoint's codes")
        return quantization.model_copy(update={"allocation": None})
    prices = _measure(checkpoint, allocation, plans, kind, progress)
    candidates = {
        plan.name: _candidates(plan, allocation, prices, scale_bytes)
        for plan in plans
        if plan.scheme is not None and _is_open(plan) and all(s in prices for s in plan.sources)
    }
    heads = _heads(candidates, joined)
    if not candidates:
        raise ConfigError(
            "the allocation has no matrix to decide on", hint="leave allocation out of the target"
        )
    rest = _rest(graph, [p for p in plans if p.name not in candidates and not p.kept], scale_bytes)
    elements = rest.elements + sum(p.shape[0] * p.shape[1] for p in plans if p.name in candidates)
    bound = None if allocation.budget_bits is None else allocation.budget_bits * elements / 8 - rest.bytes
    solved = allocate(_together(candidates, heads), most_bytes=bound, most_kl=allocation.max_kl)
    chosen = {
        name: next(each for each in priced if each.scheme == solved[heads[name]].scheme)
        for name, priced in candidates.items()
    }
    stored = rest.bytes + sum(c.bytes for c in chosen.values())
    progress.note(
        f"allocate: {8 * stored / elements:.3f} bits per weight, predicted KL divergence "
        f"{sum(c.kl for c in chosen.values()):.4f}; {_summary(chosen)}"
    )
    rules = tuple(WeightRule(match=escape(name), scheme=c.scheme) for name, c in chosen.items())
    return quantization.model_copy(update={"rules": (*rules, *quantization.rules), "allocation": None})


def _heads(
    candidates: Mapping[str, Sequence[PricedScheme]], joined: Sequence[Sequence[str]]
) -> dict[str, str]:
    """Return the matrix whose scheme each one has: the first of those that it is joined with, or itself."""
    heads = {name: name for name in candidates}
    for names in joined:
        members = [name for name in names if name in candidates]
        heads.update((name, members[0]) for name in members)
    return heads


def _together(
    candidates: Mapping[str, Sequence[PricedScheme]], heads: Mapping[str, str]
) -> dict[str, list[PricedScheme]]:
    """Return the schemes that all matrices of a head can have, with their bytes and losses added."""
    members: dict[str, list[str]] = {}
    for name, head in heads.items():
        members.setdefault(head, []).append(name)
    merged: dict[str, list[PricedScheme]] = {}
    for head, names in members.items():
        merged[head] = []
        for first in candidates[head]:
            same = [next((c for c in candidates[name] if c.scheme == first.scheme), None) for name in names]
            priced = [each for each in same if each is not None]
            if len(priced) == len(names):
                size, loss = sum(each.bytes for each in priced), sum(each.kl for each in priced)
                merged[head].append(PricedScheme(first.scheme, size, loss))
    return merged


def _is_open(plan: MatrixPlan) -> bool:
    return plan.is_linear and not plan.kept


def _choices(plan: MatrixPlan, allocation: Allocation) -> tuple[WeightScheme, ...]:
    return tuple(dict.fromkeys((*allocation.choices, *([plan.scheme] if plan.scheme else []))))


def _measure(
    checkpoint: Checkpoint,
    allocation: Allocation,
    plans: Sequence[MatrixPlan],
    scale_type: ScaleType,
    progress: Progress,
) -> Mapping[str, Array]:
    import numpy as np

    from llmc.quantize.sensitivity import SensitivityWalk

    schemes = {
        source: _choices(plan, allocation)
        for plan in plans
        if _is_open(plan) and plan.scheme is not None
        for source in plan.sources
    }
    facts = {
        "scales": np.dtype(scale_type).name,
        "schemes": {s: [c.model_dump() for c in choices] for s, choices in sorted(schemes.items())},
    }

    def work() -> Mapping[str, Array]:
        subject = prepare(checkpoint, allocation.text, "sensitivity", facts)
        walk = SensitivityWalk(
            subject.model,
            subject.layers,
            checkpoint.tensors,
            dict(checkpoint.tied),
            subject.folder,
            schemes,
            scale_type,
        )
        return walk.measure(subject.windows, lambda line: progress.note(f"allocate: {line}"))

    return walking(work)


def _candidates(
    plan: MatrixPlan, allocation: Allocation, prices: Mapping[str, Array], scale_bytes: int
) -> list[PricedScheme]:
    from llmc.quantize.blocks import stored_bytes

    return [
        PricedScheme(
            scheme,
            stored_bytes(plan.shape, scheme, scale_bytes),
            sum(float(prices[source][i]) for source in plan.sources),
        )
        for i, scheme in enumerate(_choices(plan, allocation))
    ]


def _rest(graph: Graph, plans: Sequence[MatrixPlan], scale_bytes: int) -> _Share:
    """Measure the matrices that keep what their rules say; experts are not part of the budget."""
    from llmc.quantize.blocks import stored_bytes

    total = elements = 0
    for plan in plans:
        size = plan.shape[0] * plan.shape[1]
        elements += size
        if plan.scheme is not None:
            total += stored_bytes(plan.shape, plan.scheme, scale_bytes)
        else:
            tensor = graph.graph.initializers[plan.name].const_value
            total += 0 if tensor is None else tensor.nbytes
    return _Share(total, elements)


def _summary(chosen: Mapping[str, PricedScheme]) -> str:
    counts: dict[str, int] = {}
    for each in chosen.values():
        name = f"{each.scheme.bits} bits by {each.scheme.block_size}"
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} matrices of {name}" for name, count in sorted(counts.items()))
