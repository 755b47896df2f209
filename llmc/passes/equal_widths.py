"""Pad values to the width of keys: multi-head latent attention (DeepSeek-V2, 2024) with one cache width.

Runtimes allocate keys and values of a layer alike. If values are narrower than keys, they are padded with
zeros on their way into the cache, and the same columns, sums of zeros, are cut off the result.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.graph import dialect
from llmc.graph.domains import DIALECT
from llmc.graph.edit import Site, add_constant, take_over
from llmc.graph.interface import CacheSlot
from llmc.graph.match import dims_of, find_nodes, operand
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal


@dataclass(frozen=True)
class EqualWidths:
    name: str = "equal-widths"
    summary: str = "values padded to the width of keys, so that one cache holds both"

    def run(self, graph: Graph) -> PassReport:
        applied: list[int | None] = []
        refusals: list[Refusal] = []
        attention = find_nodes(graph.graph, dialect.CACHED_ATTENTION, DIALECT)
        slots: list[CacheSlot] = []
        for slot in graph.cache:
            slots.append(slot)
            if slot.key_width == slot.value_width:
                continue
            nodes = [n for n in attention if operand(n, 4).name == slot.past_value]
            declined = _decline(slot, nodes)
            if declined is not None:
                refusals.append(Refusal(*declined, slot.past_value, slot.layer))
                continue
            padded = _pad(graph.graph, nodes[0], slot)
            for node in nodes:
                _cut(graph.graph, node, padded, slot)
                applied.append(layer_of(node))
            slots[-1] = slot.model_copy(update={"value_width": slot.key_width})
        graph.cache = tuple(slots)
        return PassReport(self.name, tuple(applied), tuple(refusals))


def _decline(slot: CacheSlot, nodes: list[ir.Node]) -> tuple[str, str] | None:
    """Return (code, reason) if the values of `slot` keep their width."""
    widths = f"keys of layer {slot.layer} are {slot.key_width} wide, values {slot.value_width}"
    if not nodes:
        return "plain-attention", f"{widths}, and the layer computes attention in plain operators"
    if slot.key_width < slot.value_width:
        return "narrow-keys", widths
    return None


def _pad(graph: ir.Graph, owner: ir.Node, slot: CacheSlot) -> ir.Value:
    """Widen the past of `slot` and its new values, for all layers that read it."""
    value, past, wide = operand(owner, 2), operand(owner, 4), slot.key_width
    pads = add_constant(graph, np.array([0] * 7 + [wide - slot.value_width], np.int64), "pads")
    shape = [*dims_of(value)[:3], wide]
    padded = Site(graph, owner).emit("Pad", [value, pads], f"{owner.name}/wide", like=value, shape=shape)
    past.shape = ir.Shape([*dims_of(past)[:3], wide])
    return padded.outputs[0]


def _cut(graph: ir.Graph, node: ir.Node, padded: ir.Value, slot: CacheSlot) -> None:
    """Let a layer read the padded values, and cut its result to the width that it has without them."""
    output, present, wide = node.outputs[0], node.outputs[2], slot.key_width
    node.replace_input_with(2, padded)
    present.shape = ir.Shape([*dims_of(present)[:3], wide])
    bounds = [add_constant(graph, np.array([n], np.int64), "bound") for n in (0, slot.value_width, 3)]
    name, metadata = f"{node.name}/narrow", node.metadata_props
    after = Site(graph, node, metadata, after=True).emit("Slice", [output, *bounds], name, node_name=name)
    take_over(output, after.outputs[0])
    output.name = f"{node.name}/wide_output"
    output.shape = ir.Shape([*dims_of(after.outputs[0])[:3], wide])
    after.replace_input_with(0, output)


PASS = EqualWidths()
