"""The methods that find the codes of a quantized matrix: one config class each.

`llmc.quantize.methods` has the handler of each, which does the work. A target states a method by its name.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, PlainSerializer
from pydantic_core import PydanticKnownError

from llmc.records import Strict


class Method(Strict):
    """A method of quantization, and what a target must know of it.

    Args:
        name: As targets state it.
        starts_from: For a method that needs calibration text, the one that finds the scales which it begins
            with; that one is used alone where calibration text is missing or brings no gain. None for a
            method that needs no calibration text.
    """

    name: ClassVar[str]
    starts_from: ClassVar["type[Method] | None"] = None

    @property
    def needs_calibration(self) -> bool:
        return self.starts_from is not None

    def uncalibrated(self) -> "Method":
        """The method that takes the place of this one without calibration text: itself, if it needs none."""
        return self if self.starts_from is None else self.starts_from()


class RoundToNearest(Method):
    """Scales that just span their blocks, and the nearest codes."""

    name = "rtn"


class LeastSquares(Method):
    """Scales searched for the least squared error, and the nearest codes."""

    name = "mse"


class Gptq(Method):
    """The scales of `LeastSquares`, and codes that compensate each other's error on calibration text."""

    name = "gptq"
    starts_from = LeastSquares


#: Every method by its name, in the order in which a tuning tries them.
METHODS: dict[str, type[Method]] = {method.name: method for method in (RoundToNearest, LeastSquares, Gptq)}


def calibrated_methods() -> list[str]:
    """Names of the methods that need calibration text."""
    return [name for name, method in METHODS.items() if method.starts_from is not None]


def _parse(value: Any) -> Method:
    if isinstance(value, Method):
        return value
    if not isinstance(value, str) or value not in METHODS:
        *first, last = map(repr, METHODS)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}"})
    return METHODS[value]()


#: A method within a scheme; it is read from its name, and written as that.
NamedMethod = Annotated[Method, BeforeValidator(_parse), PlainSerializer(lambda method: method.name, str)]
