"""What every way to quantize a graph answers: what it must know of the original, and what it stores.

A backend names the quantizer of a target. A build observes the original as the quantizer needs and applies
it; `llmc verify` applies it once more with what is left of those observations in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from llmc.arrays import Array
from llmc.config import CalibrationText, Quantization, WeightScheme
from llmc.quantize.activations import Activations, InputPlan
from llmc.quantize.awq import ChannelPlan
from llmc.quantize.blocks import ScaleType
from llmc.quantize.expert_inputs import ExpertInput
from llmc.quantize.place import QuantizedTensor

if TYPE_CHECKING:
    from llmc.artifact.manifest import WeightRecord
    from llmc.graph.model import Graph
    from llmc.quantize.calibrate import Calibration


@dataclass(frozen=True)
class FloatInput:
    """An activation that stays in float although a rule quantizes it, and so do its products.

    Args:
        weight: The first of the weights that read it.
        reason: Why.
    """

    weight: str
    reason: str


@dataclass(frozen=True)
class WeightNeeds:
    """Tensors that are quantized on calibration text.

    Args:
        text: The calibration text.
        scale_type: Type of the stored scales.
        schemes: How each tensor of the checkpoint is quantized.
        channels: Activations whose channels are scaled first where that helps.
        experts: How each stacked parameter of experts is quantized.
    """

    text: CalibrationText
    scale_type: ScaleType
    schemes: Mapping[str, WeightScheme]
    channels: tuple[ChannelPlan, ...]
    experts: Mapping[str, WeightScheme] = field(default_factory=dict)


@dataclass(frozen=True)
class InputNeeds:
    """Activations that are quantized with ranges from calibration text.

    Args:
        text: The calibration text.
        plans: The activations.
        experts: Stacks of experts whose activations are observed, too.
    """

    text: CalibrationText
    plans: tuple[InputPlan, ...]
    experts: tuple[ExpertInput, ...] = ()


@dataclass(frozen=True)
class Observations:
    """What calibration found out about the original.

    Args:
        weights: Matrices that were quantized on text; None where none is, or the cache has lost them.
        inputs: Ranges of activations and peaks of modules; None where no rule quantizes activations, or the
            cache has lost them.
    """

    weights: Calibration | None = None
    inputs: Activations | None = None

    @property
    def smoothing(self) -> Mapping[str, Array]:
        """What channels of activations are divided by, by the first of the weights that read each."""
        if self.weights is not None:
            return self.weights.smoothing
        return {} if self.inputs is None else self.inputs.smoothing


@dataclass(frozen=True)
class Quantized:
    """What became of a graph's matrices.

    Args:
        tensors: How each is stored.
        notes: Sentences for the user.
        floats: Activations that stay in float against their rule.
    """

    tensors: tuple[QuantizedTensor, ...]
    notes: tuple[str, ...] = ()
    floats: tuple[FloatInput, ...] = field(default=())


class Quantizer(Protocol):
    """One way to store the weights of a graph, with the settings of one target."""

    @property
    def bits(self) -> float | None:
        """Bits of the codes of most matrices, or of their budget; None where they stay in float."""
        ...

    @property
    def scales_channels(self) -> bool:
        """Whether calibration decides what channels are divided by, which the artifact then records."""
        ...

    @property
    def observes_inputs(self) -> bool:
        """Whether activations are quantized with ranges from calibration text."""
        ...

    @property
    def unsolved(self) -> Quantization | None:
        """Rules whose allocation of bits is yet to be solved; None where rules decide alone."""
        ...

    def solved(self, rules: Quantization) -> Quantizer:
        """The same with the rules that the allocation gave."""
        ...

    def restated(self, records: Sequence[WeightRecord]) -> Quantizer:
        """The same with an allocation solved as an artifact's records state."""
        ...

    def weight_needs(self, graph: Graph) -> WeightNeeds | None:
        """Tensors to quantize on calibration text; None where there are none."""
        ...

    def input_needs(self, graph: Graph) -> InputNeeds | None:
        """Activations to observe on calibration text; None where none is quantized so."""
        ...

    def calibrated(self, graph: Graph, needs: WeightNeeds) -> Iterator[str]:
        """Names of the graph's matrices that have codes from calibration."""
        ...

    def apply(self, graph: Graph, observed: Observations) -> Quantized:
        """Quantize the weights of `graph`; data is read when it is written.

        Raises:
            UnsupportedError: A matrix cannot be stored as its rule says.
        """
        ...
