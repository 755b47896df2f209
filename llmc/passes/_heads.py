"""Convert attention's heads to one row of features per token, as ONNX Runtime's operators expect."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.graph.domains import MICROSOFT
from llmc.graph.edit import Site, add_constant
from llmc.graph.match import dims_of, input_of, made_by, permutation_of

_NORMS = ("SimplifiedLayerNormalization", "LayerNormalization")


@dataclass
class HeadLayout:
    """Turns (batch, heads, sequence, width) into (batch, sequence, heads * width).

    Norms over the width and rotary embeddings are moved to the other side, so that the transposes that torch
    needs between products and attention disappear.

    Args:
        site: Place of new nodes.
        name: Prefix of the names of new values.
        heads: Number of heads.
        width: Width of a head.
    """

    site: Site
    name: str
    heads: int
    width: int
    _count: int = 0

    def flatten(self, value: ir.Value) -> ir.Value:
        """Convert `value` (batch, heads, sequence, width) to (batch, sequence, heads * width)."""
        transpose, rotary = made_by(value, "Transpose"), made_by(value, "RotaryEmbedding", MICROSOFT)
        heads_first = transpose is not None and permutation_of(transpose) == [0, 2, 1, 3]
        if transpose is not None and heads_first and (source := input_of(transpose)) is not None:
            return self._merge(source)
        if rotary is not None and rotary.inputs[0] is not None:
            inputs = [self.flatten(rotary.inputs[0]), *rotary.inputs[1:]]
            return self._emit("RotaryEmbedding", inputs, self._flat_dims(value), value, MICROSOFT, rotary)
        norm = next((n for op in _NORMS if (n := made_by(value, op)) is not None), None)
        if norm is not None and norm.inputs[0] is not None and self._over_width(norm):
            inner = self._split(self.flatten(norm.inputs[0]), value)
            dims = dims_of(inner)
            return self._merge(self._emit(norm.op_type, [inner, *norm.inputs[1:]], dims, value, "", norm))
        turned = self.site.emit(
            "Transpose",
            [value],
            self._next("rows"),
            attributes={"perm": [0, 2, 1, 3]},
            shape=[dims_of(value)[i] for i in (0, 2, 1, 3)],
            dtype=value.dtype,
        )
        return self._merge(turned.outputs[0])

    def _over_width(self, norm: ir.Node) -> bool:
        """Return whether the norm is over the width alone, with vectors that are the same for every head."""
        vectors = [v for v in norm.inputs[1:] if v is not None]
        return norm.attributes.get_int("axis", -1) in (-1, 3) and all(
            dims_of(v) == [self.width] for v in vectors
        )

    def _merge(self, value: ir.Value) -> ir.Value:
        """Reshape (batch, sequence, heads, width) to (batch, sequence, heads * width)."""
        reshape = made_by(value, "Reshape")
        source = input_of(reshape) if reshape is not None else None
        if source is not None and dims_of(source) == [*dims_of(value)[:2], self.heads * self.width]:
            return source
        target = add_constant(self.site.graph, np.array([0, 0, self.heads * self.width], np.int64), "shape")
        return self._emit("Reshape", [value, target], [*dims_of(value)[:2], self.heads * self.width], value)

    def _split(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Reshape (batch, sequence, heads * width) to (batch, sequence, heads, width)."""
        target = add_constant(self.site.graph, np.array([0, 0, self.heads, self.width], np.int64), "shape")
        return self._emit("Reshape", [value, target], [*dims_of(value)[:2], self.heads, self.width], like)

    def _flat_dims(self, value: ir.Value) -> list[int | str]:
        dims = dims_of(value)
        return [dims[0], dims[2], self.heads * self.width]

    def _emit(
        self,
        op: str,
        inputs: list[ir.Value | None],
        dims: list[int | str],
        like: ir.Value,
        domain: str = "",
        template: ir.Node | None = None,
    ) -> ir.Value:
        node = self.site.emit(op, inputs, self._next(op.lower()), domain=domain, shape=dims, dtype=like.dtype)
        if template is not None:
            node.attributes.update(template.attributes)
        return node.outputs[0]

    def _next(self, what: str) -> str:
        self._count += 1
        return f"{self.name}/{what}_{self._count}"
