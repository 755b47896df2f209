"""Weight-only quantization by block, which ONNX Runtime and compiled kernels read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import escape
from typing import TYPE_CHECKING

from llmc.config import Dtype, Quantization, Target, WeightRole, WeightRule, WeightScheme
from llmc.graph.match import lazy_of
from llmc.quantize.awq import plan_channels
from llmc.quantize.linear import plan_calibration, plan_matrices, quantize_weights, scale_type
from llmc.quantize.quantizer import InputNeeds, Observations, Quantized, WeightNeeds
from llmc.quantize.served_experts import find_experts, mark_experts, plan_expert_codes
from llmc.quantize.stored import origin_notes

if TYPE_CHECKING:
    from llmc.artifact.manifest import WeightRecord
    from llmc.graph.model import Graph


@dataclass(frozen=True)
class BlockQuantizer:
    """The section `quantize` of a target; without one, every matrix stays in float.

    Args:
        rules: The section.
        dtype: Type of activations, and of matrices that stay in float.
        for_servers: Whether servers read the matrices, those of experts one by one.
    """

    rules: Quantization
    dtype: Dtype
    for_servers: bool = False

    @classmethod
    def of(cls, target: Target, *, for_servers: bool = False) -> BlockQuantizer:
        """The quantizer of a target."""
        rules = target.quantize or Quantization(accuracy_level=0, rules=())
        return cls(rules, target.dtype, for_servers)

    @property
    def bits(self) -> float | None:
        """See `Quantizer`."""
        allocation = self.rules.allocation
        if allocation is not None and allocation.budget_bits is not None:
            return allocation.budget_bits
        schemes = [rule.scheme.bits for rule in self.rules.rules if rule.scheme is not None]
        return float(min(schemes)) if schemes else None

    @property
    def scales_channels(self) -> bool:
        """See `Quantizer`."""
        return self.rules.scale_channels

    @property
    def observes_inputs(self) -> bool:
        """See `Quantizer`."""
        return False

    @property
    def unsolved(self) -> Quantization | None:
        """See `Quantizer`."""
        return None if self.rules.allocation is None else self.rules

    def solved(self, rules: Quantization) -> BlockQuantizer:
        """See `Quantizer`."""
        return replace(self, rules=rules)

    def restated(self, records: Sequence[WeightRecord]) -> BlockQuantizer:
        """See `Quantizer`."""
        return replace(self, rules=restate_rules(self.rules, records))

    def weight_needs(self, graph: Graph) -> WeightNeeds | None:
        """See `Quantizer`."""
        schemes = plan_calibration(graph, self.rules, self.dtype)
        experts = self._calibrated_experts(graph)
        if self.rules.calibration is None or not (schemes or experts):
            return None
        channels = plan_channels(graph, schemes) if self.rules.scale_channels else ()
        kind = scale_type(self.rules, self.dtype)
        return WeightNeeds(self.rules.calibration, kind, schemes, tuple(channels), experts)

    def _calibrated_experts(self, graph: Graph) -> dict[str, WeightScheme]:
        return plan_expert_codes(graph, self.rules.rules) if self.for_servers else {}

    def input_needs(self, graph: Graph) -> InputNeeds | None:
        """See `Quantizer`."""
        return None

    def calibrated(self, graph: Graph, needs: WeightNeeds) -> Iterator[str]:
        """See `Quantizer`."""
        for plan in plan_matrices(graph, self.rules, self.dtype):
            if needs.schemes.keys() & set(plan.sources):
                yield plan.name
        for weight in find_experts(graph) if needs.experts else ():
            if lazy_of(weight).sources[0] in needs.experts:
                yield str(weight.name)

    def apply(self, graph: Graph, observed: Observations) -> Quantized:
        """See `Quantizer`."""
        stored = quantize_weights(graph, self.rules, self.dtype, observed.weights)
        if not self.for_servers:
            return Quantized(stored.tensors, (*stored.notes, *origin_notes(stored.tensors)))
        codes = None if observed.weights is None else observed.weights.experts
        experts, _ = mark_experts(graph, self.rules.rules, codes=codes)
        tensors = (*stored.tensors, *experts)
        notes = () if codes is None else tuple(codes.describe())
        return Quantized(tensors, (*stored.notes, *notes, *origin_notes(tensors)))


def restate_rules(quantization: Quantization, records: Sequence[WeightRecord]) -> Quantization:
    """Put a rule in front for each matrix that an allocation decided on, as the records state it."""
    allocation = quantization.allocation
    if allocation is None:
        return quantization
    ruled = [rule.scheme for rule in quantization.rules if rule.scheme is not None]
    schemes = [*allocation.choices, *ruled]
    rules = []
    for record in records:
        scheme = next((s for s in schemes if _fits(s, record)), None)
        if scheme is not None and record.role is not WeightRole.EXPERTS:
            rules.append(WeightRule(match=escape(record.name), scheme=scheme))
    return quantization.model_copy(update={"rules": (*rules, *quantization.rules), "allocation": None})


def _fits(scheme: WeightScheme, record: WeightRecord) -> bool:
    stated = (record.bits, record.block_size, record.symmetric)
    return stated == (scheme.bits, scheme.block_size, scheme.symmetric)
