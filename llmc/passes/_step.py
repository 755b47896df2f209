"""Emit once what operators of all layers take: lengths, empty keys, hidden chunks, real tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from llmc.errors import GraphError
from llmc.graph.edit import Attribute, Site, add_constant

_INT32, _INT64, _BOOL = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL


@dataclass
class StepValues:
    """The values that are the same for all layers, each emitted once, before the first node of the graph."""

    graph: ir.Graph
    _values: dict[str, ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._site = Site(self.graph, next(iter(self.graph)), metadata={})
        inputs = {str(v.name): v for v in self.graph.inputs}
        if not {"input_ids", "attention_mask"} <= set(inputs):
            raise GraphError(f"the graph has inputs {sorted(inputs)}, but attention needs tokens and a mask")
        self._ids, self._mask = inputs["input_ids"], inputs["attention_mask"]

    def lengths(self) -> tuple[ir.Value, ir.Value]:
        """Return (real tokens per row - 1 (batch,), total length ()), both int32."""
        no_axis, to = {"keepdims": 0}, {"to": int(_INT32)}
        counts = self._emit("ReduceSum", [self._mask, self._axis(1)], "lengths/sum", ["batch"], no_axis)
        last = self._emit("Sub", [counts, self._axis(1)], "lengths/last", ["batch"])
        scalar = self._emit("Squeeze", [self._size(self._mask, 1)], "lengths/total", [])
        rows = self._emit("Cast", [last], "seqlens_k", ["batch"], to, _INT32)
        return rows, self._emit("Cast", [scalar], "total_sequence_length", [], to, _INT32)

    def empty(self, features: int, dtype: ir.DataType) -> ir.Value:
        """Return rows without any token, (batch, 0, features)."""
        name = f"empty_{features}_{dtype.name.lower()}"
        sizes = add_constant(self.graph, np.array([0, features], np.int64), "sizes")
        dims = [self._size(self._mask, 0), sizes]
        shape = self._emit("Concat", dims, f"{name}/shape", [3], {"axis": 0})
        filled: dict[str, Attribute] = {
            "value": ir.AttrTensor("value", ir.tensor(np.zeros(1, dtype.numpy())))
        }
        return self._emit("ConstantOfShape", [shape], name, ["batch", 0, features], filled, dtype)

    def other_chunks(self, chunk: int, dtype: ir.DataType) -> ir.Value:
        """Return a bias (batch, 1, sequence, total) that hides all keys outside of a query's chunk.

        The operator stores the key at position j of a row in slot j, wherever the mask has its padding.
        """
        name = f"chunk_{chunk}_{dtype.name.lower()}"
        total, step = self._size(self._mask, 1), self._size(self._ids, 1)
        past = self._emit("Sub", [total, step], "positions/past", [1])
        one = self._axis(1)
        counts = self._emit("CumSum", [self._mask, one], "positions/counts", ["batch", "total"])
        new = self._emit("Slice", [counts, past, total, one], "positions/new_counts", ["batch", "sequence"])
        queries = self._emit("Sub", [new, one], "positions/new", ["batch", "sequence"])
        numbers = [add_constant(self.graph, np.array(n, np.int64), "number") for n in (0, 1, chunk)]
        end = self._emit("Squeeze", [total], "positions/end", [])
        keys = self._emit("Range", [numbers[0], end, numbers[1]], "positions/keys", ["total"])
        mine = self._emit("Div", [queries, numbers[2]], f"{name}/queries", ["batch", "sequence"])
        axes = add_constant(self.graph, np.array([1, 3], np.int64), "axis")
        mine = self._emit("Unsqueeze", [mine, axes], f"{name}/rows", ["batch", 1, "sequence", 1])
        theirs = self._emit("Div", [keys, numbers[2]], f"{name}/keys", ["total"])
        dims: list[int | str] = ["batch", 1, "sequence", "total"]
        same = self._emit("Equal", [mine, theirs], f"{name}/same", dims, None, ir.DataType.BOOL)
        kind = dtype.numpy()
        limits = ir.DataType.FLOAT.numpy() if dtype == ir.DataType.BFLOAT16 else kind
        shown, hidden = (
            add_constant(self.graph, np.array(n, kind), "bias") for n in (0.0, np.finfo(limits).min)
        )
        return self._emit("Where", [same, shown, hidden], name, dims, None, dtype)

    def real_tokens(self) -> ir.Value:
        """Return which tokens of the step are real, (batch, sequence, 1) bool."""
        dims: list[int | str] = ["batch", "sequence", 1]
        column = self._emit("Unsqueeze", [self._step_mask(), self._axis(2)], "tokens/column", dims)
        return self._emit("Cast", [column], "tokens/real", dims, {"to": int(_BOOL)}, _BOOL)

    def last_tokens(self) -> ir.Value:
        """Return the number of tokens of each row up to its last real one, (batch, 1, 1) int64; 0 if none."""
        if "tokens/last" not in self._values:
            self._values["tokens/last"] = count_slots(self._site, self._step_mask(), "tokens", before=False)
        last = self._values["tokens/last"]
        return self._emit("Unsqueeze", [last, self._axis(2)], "tokens/ends", ["batch", 1, 1])

    def _step_mask(self) -> ir.Value:
        start = self._emit("Neg", [self._step_length()], "tokens/start", [1])
        end = self._axis(np.iinfo(np.int64).max)
        bounds = [self._mask, start, end, self._axis(1)]
        return self._emit("Slice", bounds, "tokens/mask", ["batch", "sequence"])

    def _step_length(self) -> ir.Value:
        return self._emit("Shape", [self._ids], "tokens/length", [1], {"start": 1, "end": 2})

    def _size(self, value: ir.Value, axis: int) -> ir.Value:
        """Return one dimension of an input, (1,) int64."""
        span = {"start": axis, "end": axis + 1}
        return self._emit("Shape", [value], f"lengths/{value.name}_{axis}", [1], span)

    def _axis(self, axis: int) -> ir.Value:
        return add_constant(self.graph, np.array([axis], np.int64), "axis")

    def _emit(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: Sequence[int | str],
        attributes: Mapping[str, Attribute] | None = None,
        dtype: ir.DataType = _INT64,
    ) -> ir.Value:
        if name not in self._values:
            node = self._site.emit(op, inputs, name, attributes=attributes, shape=shape, dtype=dtype)
            self._values[name] = node.outputs[0]
        return self._values[name]


def count_slots(site: Site, mask: ir.Value, name: str, *, before: bool) -> ir.Value:
    """Emit the number of slots up to the last real token of each row, (batch, 1) int64; 0 if there is none.

    A reversed sum of the mask is at least 1 up to that token, wherever the row is padded. CUDA has kernels of
    all three operators, without cuDNN, and none of ArgMax with select_last_index.

    Args:
        mask: (batch, slots) int64, 1 where a token is real.
        name: Prefix of the names of new values.
        before: Count only the slots before that token, which is its index.
    """
    batch = (mask.shape or ir.Shape(["batch"]))[0]
    axis, row = (add_constant(site.graph, np.array(n, np.int64), "axis") for n in (1, [1]))
    reverse = {"reverse": 1, "exclusive": int(before)}
    after = site.emit("CumSum", [mask, axis], f"{name}/after", attributes=reverse, like=mask)
    counted = site.emit("Min", [after.outputs[0], row], f"{name}/counted", like=mask)
    return site.emit(
        "ReduceSum", [counted.outputs[0], row], f"{name}/slots", shape=[batch, 1], dtype=_INT64
    ).outputs[0]
