"""Translate operators of torch to ONNX that torch's exporter does not translate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

#: Coefficients of Giles (2010), "Approximating the erfinv function", for w < 5 and beyond, highest power
#: first; in exact arithmetic the result is off by at most 4e-7 of itself.
_CENTRAL = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
    -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
    0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip


def translations() -> dict[Any, Callable[..., Any]]:
    """Return a function for each operator, which emits its ONNX operators."""
    import torch

    return {torch.ops.prims.erf_inv.default: _erf_inv}


def _erf_inv(x: Any) -> Any:
    """Emit the inverse of the error function (Giles 2010): x p(w) with w = -log((1 - x) (1 + x))."""
    from onnxscript import opset18 as op

    def constant(value: float) -> Any:
        number: Any = op.Constant(value_float=value)
        return op.CastLike(number, x)

    def polynomial(w: Any, coefficients: Sequence[float]) -> Any:
        result = constant(coefficients[0])
        for coefficient in coefficients[1:]:
            result = op.Add(constant(coefficient), op.Mul(result, w))
        return result

    one = constant(1.0)
    w = op.Neg(op.Log(op.Mul(op.Sub(one, x), op.Add(one, x))))
    central = polynomial(op.Sub(w, constant(2.5)), _CENTRAL)
    tail = polynomial(op.Sub(op.Sqrt(w), constant(3.0)), _TAIL)
    return op.Mul(x, op.Where(op.Less(w, constant(5.0)), central, tail))
