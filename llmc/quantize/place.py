"""Which scheme a weight gets, and the record of how it is stored."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from llmc.config import EngineScheme, Rule, Scheme, WeightRole, WeightScheme


@dataclass(frozen=True)
class QuantizedTensor:
    """How one matrix is stored.

    Args:
        name: Its initializer in the graph before quantization.
        role: Role its rule was chosen by.
        shape: As the checkpoint has it.
        scheme: None where it stays in float.
        bytes: All that is stored for it: codes, scales and any zero points, or the float matrix.
        origin: What became of the codes that the checkpoint has for it; None where it has floats.
    """

    name: str
    role: WeightRole
    shape: tuple[int, ...]
    scheme: WeightScheme | EngineScheme | None
    bytes: int
    origin: str | None = None


def choose_scheme(rules: Iterable[Rule[Scheme]], role: WeightRole, name: str) -> Scheme | None:
    """The scheme of the first rule that fits; None (float) where it says so or none fits."""
    for rule in rules:
        if rule.role in (None, role) and fnmatchcase(name, rule.match):
            return rule.scheme
    return None
