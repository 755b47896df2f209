"""Store what layers with attention in plain operators keep of every token: keys, values, and an index's keys.

Runtimes allocate keys and values alike. Tensors that are not alike are therefore stored as the two halves of
one: values of another width behind the keys, and the keys of an index (sparse attention as in DeepSeek-V3.2)
in a slot of their own, which is numbered like a layer behind the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from llmc.graph.domains import TRACE
from llmc.graph.edit import Attribute, Site, add_constant
from llmc.graph.interface import CacheSlot
from llmc.graph.match import dims_of, find_nodes, operand
from llmc.graph.model import LAYER
from llmc.trace.cache import EXTEND, INDEX

_SLOTS, _WIDTH = 2, 3


def slot_of(layer: int, heads: int, key_width: int, value_width: int, window: int | None) -> CacheSlot:
    """Return the slot of a layer, with the names of its inputs and outputs."""
    return CacheSlot(
        layer=layer,
        past_key=f"past_key_values.{layer}.key",
        past_value=f"past_key_values.{layer}.value",
        present_key=f"present.{layer}.key",
        present_value=f"present.{layer}.value",
        kv_heads=heads,
        key_width=key_width,
        value_width=value_width,
        window=window,
    )


def attach_stored(graph: ir.Graph, layers: int) -> list[CacheSlot]:
    """Replace every `ExtendCache` and `ExtendIndex` by concatenations of an input with what is new.

    Args:
        layers: Number of decoder layers.

    Returns:
        The slots.
    """
    slots = []
    for node in find_nodes(graph, EXTEND, TRACE):
        place = _Place(graph, node, node.attributes["layer"].as_int())
        keys, values = (operand(node, i) for i in (0, 1))
        if _width(keys) == _width(values):
            place.replace(place.extend(keys, values))
        else:
            place.replace(place.split(place.extend_halves(place.join(keys, values)), _width(keys)))
        slots.append(place.slot)
    for node in find_nodes(graph, INDEX, TRACE):
        place = _Place(graph, node, layers + node.attributes["layer"].as_int())
        batch, sequence, width = dims_of(operand(node, 0))
        head = place.emit("Unsqueeze", [operand(node, 0), place.ints(1)], "head", [batch, 1, sequence, width])
        whole = place.extend_halves(head)
        shape = [batch, "total", width]
        place.replace([place.emit("Squeeze", [whole, place.ints(1)], "whole", shape)])
        slots.append(place.slot)
    return slots


@dataclass
class _Place:
    """The place of one node, and the slot that is made for it.

    Args:
        number: Number of the slot among layers.
    """

    graph: ir.Graph
    node: ir.Node
    number: int
    slot: CacheSlot = field(init=False)

    def extend(self, keys: ir.Value, values: ir.Value) -> list[ir.Value]:
        """Append keys and values (batch, heads, sequence, width) to a past that becomes an input."""
        heads, widths = int(str(dims_of(keys)[1])), (_width(keys), _width(values))
        self.slot = slot_of(self.number, heads, *widths, None)
        wholes = []
        for (past_name, present_name), width, new in zip(
            self.slot.pairs, widths, (keys, values), strict=True
        ):
            past = ir.val(past_name, new.dtype, ["batch", heads, "past", width])
            present = ir.val(present_name, new.dtype, ["batch", heads, "total", width])
            node = ir.Node(
                "",
                "Concat",
                [past, new],
                [ir.AttrInt64("axis", _SLOTS)],
                outputs=[present],
                name=f"layer.{self.number}/{present_name}",
                metadata_props=dict(self._site.metadata or {}),
            )
            self.graph.insert_before(self.node, node)
            self.graph.inputs.append(past)
            self.graph.outputs.append(present)
            wholes.append(present)
        return wholes

    def extend_halves(self, new: ir.Value) -> ir.Value:
        """Append `new` as keys that are its first half and values that are its second."""
        width = _width(new)
        if width % 2:
            pads = self.ints(*[0] * 7, 1)
            new = self.emit("Pad", [new, pads], "padded", [*dims_of(new)[:_WIDTH], width + 1])
        keys, values = self.extend(*self._parts(new, [_width(new) // 2] * 2, "half"))
        whole = self.join(keys, values)
        if width % 2:
            bounds = (self.ints(0), self.ints(width), self.ints(_WIDTH))
            whole = self.emit("Slice", [whole, *bounds], "cut", [*dims_of(whole)[:_WIDTH], width])
        return whole

    def join(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Return both side by side."""
        shape = [*dims_of(first)[:_WIDTH], _width(first) + _width(second)]
        return self.emit("Concat", [first, second], f"{first.name}/joined", shape, {"axis": _WIDTH})

    def split(self, whole: ir.Value, width: int) -> list[ir.Value]:
        """Return the first `width` columns, and the others."""
        return self._parts(whole, [width, _width(whole) - width], "whole")

    def replace(self, values: Sequence[ir.Value]) -> None:
        """Let users of the node read `values`, and remove it."""
        for old, new in zip(self.node.outputs, values, strict=True):
            ir.convenience.replace_all_uses_with(old, new)
        self.graph.remove(self.node, safe=True)

    def ints(self, *values: int) -> ir.Value:
        """Return a constant of integers."""
        return add_constant(self.graph, np.array(values, np.int64), "sizes")

    def emit(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: Sequence[int | str | ir.SymbolicDim],
        attributes: dict[str, Attribute] | None = None,
    ) -> ir.Value:
        """Emit an operator whose result has the type of its first input."""
        node = self._site.emit(
            op,
            inputs,
            f"layer.{self.number}/{name}",
            attributes=attributes,
            shape=shape,
            dtype=inputs[0].dtype,
        )
        return node.outputs[0]

    @property
    def _site(self) -> Site:
        layer = self.node.attributes["layer"].as_int()
        return Site(self.graph, self.node, metadata={LAYER: str(layer)})

    def _parts(self, value: ir.Value, widths: Sequence[int], name: str) -> list[ir.Value]:
        starts = np.cumsum([0, *widths]).tolist()
        return [
            self.emit(
                "Slice",
                [value, self.ints(start), self.ints(start + width), self.ints(_WIDTH)],
                f"{name}.{n}",
                [*dims_of(value)[:_WIDTH], width],
            )
            for n, (start, width) in enumerate(zip(starts, widths, strict=False))
        ]


def _width(value: ir.Value) -> int:
    return int(str(dims_of(value)[_WIDTH]))
