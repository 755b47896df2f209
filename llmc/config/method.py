"""Define the methods that find the codes of a quantized matrix: one config class each.

`llmc.quantize.methods` has the handler of each method, which does the work. A target states a method by its
name.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, PlainSerializer
from pydantic_core import PydanticKnownError

from llmc.records import Strict


class Method(Strict):
    """The base of quantization methods, with what a target must know of them.

    Args:
        name: Name of the method in targets.
        starts_from: For a method that needs calibration text, the method that finds its initial scales; that
            method is used alone if calibration text is missing or brings no gain. None for a method that
            needs no calibration text.
    """

    name: ClassVar[str]
    starts_from: ClassVar["type[Method] | None"] = None

    @property
    def needs_calibration(self) -> bool:
        return self.starts_from is not None

    def uncalibrated(self) -> "Method":
        """Return the method that replaces this one without calibration text; itself if it needs none."""
        return self if self.starts_from is None else self.starts_from()


class RoundToNearest(Method):
    """The method of scales that just span their blocks, with the nearest codes."""

    name = "rtn"


class LeastSquares(Method):
    """The method of scales that minimize the squared error, with the nearest codes."""

    name = "mse"


class Gptq(Method):
    """The method of `LeastSquares` scales and of codes that compensate each other's error on a text."""

    name = "gptq"
    starts_from = LeastSquares


#: Every method by its name, in the order in which a tuning tries them.
METHODS: dict[str, type[Method]] = {method.name: method for method in (RoundToNearest, LeastSquares, Gptq)}


def calibrated_methods() -> list[str]:
    """Return the names of the methods that need calibration text."""
    return [name for name, method in METHODS.items() if method.starts_from is not None]


def _parse(value: Any) -> Method:
    if isinstance(value, Method):
        return value
    if not isinstance(value, str) or value not in METHODS:
        *first, last = map(repr, METHODS)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}"})
    return METHODS[value]()


#: A method within a scheme; it is read from its name, and written as its name.
NamedMethod = Annotated[Method, BeforeValidator(_parse), PlainSerializer(lambda method: method.name, str)]
