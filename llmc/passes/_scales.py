"""Match vectors that a norm multiplies by: a weight or 1 + weight, possibly cast, as one initializer."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.graph.edit import add_constant, add_weight
from llmc.graph.match import input_of, made_by, operands, scalar_of
from llmc.graph.weights import CastRows, LazyWeight, Rows, ShiftedRows


@dataclass(frozen=True)
class Scale:
    """A vector (width,) equal to `weight + shift`.

    Args:
        weight: The initializer.
        rows: Rows of the initializer.
        shift: Constant that the graph adds to it; 0 if none.
    """

    weight: ir.Value
    rows: Rows
    shift: float

    def bind(self, graph: ir.Graph, dtype: ir.DataType) -> ir.Value:
        """Return the initializer of type `dtype` that holds the scale."""
        if self.shift == 0 and self.weight.dtype == dtype:
            return self.weight
        name = str(self.weight.name)
        rows: Rows
        if self.shift:
            rows, name = ShiftedRows(self.rows, self.shift, dtype), f"{name}.plus_{self.shift:g}"
        else:
            rows = CastRows(self.rows, dtype)
        return add_weight(graph, name if self.shift else f"{name}.{dtype.name.lower()}", rows)


def scale_of(value: ir.Value | None, width: int | None) -> Scale | None:
    """Match a scale: an initializer (width,), possibly shifted by a constant and cast."""
    shift = 0.0
    while value is not None:
        tensor = value.const_value
        if isinstance(tensor, LazyWeight):
            if tensor.rows is None or tensor.rows.shape != (width,):
                return None
            return Scale(value, tensor.rows, shift)
        if (cast := made_by(value, "Cast")) is not None:
            value = input_of(cast)
        elif (add := made_by(value, "Add")) is not None and not shift:
            value = None
            for one, other in operands(add):
                number = scalar_of(other)
                if number is not None:
                    value, shift = one, number
                    break
        else:
            return None
    return None


def unit_scale(graph: ir.Graph, width: int, dtype: ir.DataType) -> ir.Value:
    """Return an initializer of ones, (width,)."""
    return add_constant(graph, np.ones(width, dtype.numpy()), "ones")
