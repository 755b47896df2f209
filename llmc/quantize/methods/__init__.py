"""Implement the quantization methods: one handler per file, each a module with one object called `HANDLER`.

A handler does the work of one config class of `llmc.config.method`. Callers ask for the handler of a scheme,
and never for the name of its method.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from functools import cache
from typing import ClassVar

from llmc.arrays import Array
from llmc.calibration.hessian import InputHessian
from llmc.config import Method, WeightScheme
from llmc.errors import ConfigError
from llmc.quantize.blocks import PackedBlocks, ScaleType, Workspace


class Handler(ABC):
    """The base class of handlers, which find scales and zero points of blocks; codes are the nearest ones.

    Args:
        method: The config class that this handler belongs to.
        only_extremes: Whether `fit` needs the extremes of a block alone, so that a block may have several
            columns.
    """

    method: type[Method]
    only_extremes: ClassVar[bool] = False

    @abstractmethod
    def fit(self, work: Workspace, scheme: WeightScheme, scale_type: ScaleType) -> tuple[Array, Array]:
        """Return scales, as `scale_type` holds them, and zero points of `work.columns`, float32 (n,) each."""


class CalibratedHandler(Handler):
    """The base class of handlers that find the codes of a whole matrix by its inputs on calibration text.

    Without such text the matrix is quantized by the method from which this one starts.
    """

    def fit(self, work: Workspace, scheme: WeightScheme, scale_type: ScaleType) -> tuple[Array, Array]:
        start = scheme.model_copy(update={"method": scheme.method.uncalibrated()})
        return find_handler(start).fit(work, start, scale_type)

    @abstractmethod
    def calibrate(
        self, weights: Array, hessian: InputHessian, scheme: WeightScheme, scale_type: ScaleType, name: str
    ) -> PackedBlocks:
        """Quantize a matrix (N, K) by the Hessian of its inputs.

        Raises:
            CheckpointError: A weight, scale or activation is not finite.
            ConfigError: The text does not determine the codes.
        """


@cache
def registered_handlers() -> dict[type[Method], Handler]:
    """Import every handler of this package by its config class; a module that fails to import is an error."""
    handlers: dict[type[Method], Handler] = {}
    for info in pkgutil.iter_modules(__path__):
        handler: Handler = importlib.import_module(f"{__name__}.{info.name}").HANDLER
        if handler.method in handlers:
            raise ConfigError(f"method {handler.method.name} has two handlers")
        handlers[handler.method] = handler
    return handlers


def find_handler(scheme: WeightScheme) -> Handler:
    """Return the handler of the method of `scheme`.

    Raises:
        ConfigError: The method has no handler.
    """
    handler = registered_handlers().get(type(scheme.method))
    if handler is None:
        raise ConfigError(
            f"method {scheme.method.name} has no handler",
            hint="add a file with its HANDLER to llmc/quantize/methods",
        )
    return handler


def find_calibrated(scheme: WeightScheme) -> CalibratedHandler:
    """Return the handler of the method of `scheme`, which needs calibration text.

    Raises:
        ConfigError: The method has no handler, or a handler that uses no calibration text.
    """
    handler = find_handler(scheme)
    if not isinstance(handler, CalibratedHandler):
        raise ConfigError(f"method {scheme.method.name} is not calibrated")
    return handler
