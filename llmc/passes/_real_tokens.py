"""Compute once per graph which tokens of a step are real, for operators with states of fixed size."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.graph.edit import Site, add_constant
from llmc.graph.match import dims_of

Dim = int | str | ir.SymbolicDim

_INT64, _BOOL = ir.DataType.INT64, ir.DataType.BOOL


@dataclass(frozen=True)
class RealTokens:
    """Values derived from attention_mask (batch, total) and the length of a step.

    They are emitted at the beginning of the graph when they are first needed, by whichever pass.

    Args:
        graph: The graph to which they are added.
        mask: Its attention_mask.
    """

    graph: ir.Graph
    mask: ir.Value

    def real(self) -> ir.Value:
        """Return which tokens of the step are real, (batch, sequence, 1) bool."""
        batch, sequence = self._dims()

        def make() -> ir.Value:
            column = self._emit("Unsqueeze", [self._step(), self._axis(2)], "column", [batch, sequence, 1])
            return self._emit("Cast", [column], "real", [batch, sequence, 1], _BOOL, to=int(_BOOL))

        return self._once("real", make)

    def ends(self) -> ir.Value:
        """Return the number of tokens of each row up to its last real one, (batch, 1, 1) int64; 0 if none."""
        batch, sequence = self._dims()

        def make() -> ir.Value:
            one = add_constant(self.graph, np.array(1, np.int64), "scalar")
            length = self._emit("Squeeze", [self._length()], "scalar", [])
            after = self._emit("Add", [length, one], "after", [])
            numbers = self._emit("Range", [one, after, one], "numbers", [sequence])
            numbered = self._emit("Mul", [self._step(), numbers], "numbered", [batch, sequence])
            last = self._emit("ReduceMax", [numbered, self._axis(1)], "last", [batch, 1], keepdims=1)
            return self._emit("Unsqueeze", [last, self._axis(2)], "ends", [batch, 1, 1])

        return self._once("ends", make)

    def _step(self) -> ir.Value:
        batch, sequence = self._dims()

        def make() -> ir.Value:
            end = add_constant(self.graph, np.array([np.iinfo(np.int64).max], np.int64), "end")
            start = self._emit("Neg", [self._length()], "start", [1])
            return self._emit("Slice", [self.mask, start, end, self._axis(1)], "mask", [batch, sequence])

        return self._once("mask", make)

    def _length(self) -> ir.Value:
        return self._once("length", lambda: self._emit("Shape", [self._ids()], "length", [1], start=1, end=2))

    def _ids(self) -> ir.Value:
        return next(v for v in self.graph.inputs if v.name == "input_ids")

    def _dims(self) -> tuple[Dim, Dim]:
        batch, sequence = dims_of(self._ids())
        return batch, sequence

    def _axis(self, axis: int) -> ir.Value:
        return add_constant(self.graph, np.array([axis], np.int64), "axis")

    def _once(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        wanted = f"step/{name}"
        return next((v for node in self.graph for v in node.outputs if v.name == wanted), None) or make()

    def _emit(
        self,
        op: str,
        inputs: list[ir.Value],
        name: str,
        shape: list[Dim],
        dtype: ir.DataType = _INT64,
        **attributes: int,
    ) -> ir.Value:
        first = next(n for n in self.graph if not str(n.outputs[0].name).startswith("step/"))
        site = Site(self.graph, first, metadata={})
        node = site.emit(op, inputs, f"step/{name}", attributes=attributes, shape=shape, dtype=dtype)
        return node.outputs[0]
