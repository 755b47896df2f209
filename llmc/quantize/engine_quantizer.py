"""Quantization of weights and activations by ONNX operators, which TensorRT reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.config import Dtype, Quantization, TypedWeights
from llmc.quantize.activations import plan_inputs
from llmc.quantize.engine import quantize_for_engine
from llmc.quantize.expert_inputs import describe_tokens
from llmc.quantize.quantizer import InputNeeds, Observations, Quantized, WeightNeeds
from llmc.quantize.served_experts import mark_experts, plan_expert_inputs
from llmc.quantize.stored import origin_notes

if TYPE_CHECKING:
    from llmc.artifact.manifest import WeightRecord
    from llmc.graph.model import Graph


@dataclass(frozen=True)
class EngineQuantizer:
    """The rules for types that products are computed in, of the section `engine` or `checkpoint` of a target.

    Args:
        section: The section.
        dtype: Type of activations, and of matrices that stay in float.
        for_servers: Whether servers quantize the activations, and the weights are for them.
    """

    section: TypedWeights
    dtype: Dtype
    for_servers: bool = False

    @property
    def bits(self) -> float | None:
        """See `Quantizer`."""
        bits = [rule.scheme.bits for rule in self.section.weights if rule.scheme is not None]
        return float(min(bits)) if bits else None

    @property
    def scales_channels(self) -> bool:
        """See `Quantizer`."""
        return self.observes_inputs

    @property
    def observes_inputs(self) -> bool:
        """See `Quantizer`."""
        return self.section.calibration is not None and self.section.quantizes_activations

    @property
    def unsolved(self) -> Quantization | None:
        """See `Quantizer`."""
        return None

    def solved(self, rules: Quantization) -> EngineQuantizer:
        """See `Quantizer`."""
        return self

    def restated(self, records: Sequence[WeightRecord]) -> EngineQuantizer:
        """See `Quantizer`."""
        return self

    def weight_needs(self, graph: Graph) -> WeightNeeds | None:
        """See `Quantizer`."""
        return None

    def input_needs(self, graph: Graph) -> InputNeeds | None:
        """See `Quantizer`."""
        text = self.section.calibration if self.observes_inputs else None
        if text is None:
            return None
        rules = self.section.weights
        experts = plan_expert_inputs(graph, rules) if self.for_servers else ()
        return InputNeeds(text, plan_inputs(graph, rules), experts)

    def calibrated(self, graph: Graph, needs: WeightNeeds) -> Iterator[str]:
        """See `Quantizer`."""
        yield from ()

    def apply(self, graph: Graph, observed: Observations) -> Quantized:
        """See `Quantizer`."""
        ranges = None if observed.inputs is None else observed.inputs.ranges
        tensors, floats = quantize_for_engine(
            graph,
            self.section.weights,
            ranges,
            self.section.least_activation_db,
            for_servers=self.for_servers,
        )
        notes: list[str] = []
        if self.for_servers:
            experts = None if observed.inputs is None else observed.inputs.experts
            marked, beside = mark_experts(
                graph, self.section.weights, experts, self.section.least_activation_db
            )
            tensors, floats = (*tensors, *marked), (*floats, *beside)
            notes += describe_tokens(experts or {})
        stay = [f"what {f.weight} is given stays in {self.dtype.value}: {f.reason}" for f in floats]
        return Quantized(tensors, (*stay, *notes, *origin_notes(tensors)), floats)
