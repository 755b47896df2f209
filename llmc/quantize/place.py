"""Choose the scheme of a weight by the rules, and record how it is stored."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from llmc.config import EngineScheme, Rule, Scheme, WeightRole, WeightScheme

if TYPE_CHECKING:
    from llmc.quantize.blocks import PackedBlocks

#: The key of `CodedAs` in the `meta` of the initializer that holds the codes of a matrix.
CODED_AS = "llmc.coded_as"


#: The key of `ExpertsAs`, or None for float, in the `meta` of the initializer of stacked experts.
EXPERTS_AS = "llmc.experts_as"


@dataclass(frozen=True)
class ExpertsAs:
    """How each matrix of a stack of experts is stored.

    Args:
        input_scale: Scale by which servers quantize what an expert reads, the same for all experts of the
            stack; None if there is none.
        calibrated: Whether codes may come from calibration.
        codes: Returns the codes of some outputs of an expert's matrix from calibration, by its index, the
            outputs and the number of inputs; None if it was not calibrated.
    """

    scheme: WeightScheme | EngineScheme
    input_scale: float | None = None
    calibrated: bool = False
    codes: Callable[[int, tuple[int, int], int], "PackedBlocks | None"] | None = None


@dataclass(frozen=True)
class CodedAs:
    """What the codes of a matrix of a graph are.

    Args:
        scheme: Its scheme.
        shape: (N, K): outputs and inputs, without padding.
        outputs_first: Whether the outputs are the first axis of the codes.
        input_scale: Scale by which servers quantize its activation; None if there is none.
    """

    scheme: WeightScheme | EngineScheme
    shape: tuple[int, int]
    outputs_first: bool
    input_scale: float | None = None


@dataclass(frozen=True)
class QuantizedTensor:
    """The record of how one matrix is stored.

    Args:
        name: Name of its initializer in the graph before quantization.
        role: Role by which its rule was chosen.
        shape: Shape in the checkpoint.
        scheme: Its scheme; None if it stays in float.
        bytes: Bytes of everything stored for it: codes, scales and any zero points, or the float matrix.
        origin: How the codes that the checkpoint has for it were handled; None if it has floats.
    """

    name: str
    role: WeightRole
    shape: tuple[int, ...]
    scheme: WeightScheme | EngineScheme | None
    bytes: int
    origin: str | None = None


def choose_scheme(rules: Iterable[Rule[Scheme]], role: WeightRole, name: str) -> Scheme | None:
    """Return the scheme of the first rule that matches; None (float) if that rule says so or none matches."""
    for rule in rules:
        if rule.role in (None, role) and fnmatchcase(name, rule.match):
            return rule.scheme
    return None
