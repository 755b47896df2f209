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
        attention = {n.inputs[4]: n for n in find_nodes(graph.graph, dialect.CACHED_ATTENTION, DIALECT)}
        slots: list[CacheSlot] = []
        for slot in graph.cache:
            slots.append(slot)
            if slot.key_width == slot.value_width:
                continue
            node = next(
                (n for v, n in attention.items() if v is not None and v.name == slot.past_value), None
            )
            declined = _decline(slot, node)
            if node is None or declined is not None:
                refusals.append(Refusal(*(declined or ("", "")), slot.past_value, slot.layer))
                continue
            _widen(graph.graph, node, slot.key_width, slot.value_width)
            slots[-1] = slot.model_copy(update={"value_width": slot.key_width})
            applied.append(layer_of(node))
        graph.cache = tuple(slots)
        return PassReport(self.name, tuple(applied), tuple(refusals))


def _decline(slot: CacheSlot, node: ir.Node | None) -> tuple[str, str] | None:
    """Return (code, reason) if the values of `slot` keep their width."""
    widths = f"keys of layer {slot.layer} are {slot.key_width} wide, values {slot.value_width}"
    if node is None:
        return "plain-attention", f"{widths}, and the layer computes attention in plain operators"
    if slot.key_width < slot.value_width:
        return "narrow-keys", widths
    if len(operand(node, 4).consumers()) > 1:
        return "shared-cache", f"several layers read and extend {slot.past_value} in one step"
    return None


def _widen(graph: ir.Graph, node: ir.Node, wide: int, narrow: int) -> None:
    value, past, output = operand(node, 2), operand(node, 4), node.outputs[0]
    site, stem = Site(graph, node), str(node.name)
    pads = add_constant(graph, np.array([0, 0, 0, 0, 0, 0, 0, wide - narrow], np.int64), "pads")
    padded = site.emit("Pad", [value, pads], f"{stem}/wide", like=value, shape=[*dims_of(value)[:3], wide])
    node.replace_input_with(2, padded.outputs[0])
    for cached in (past, node.outputs[2]):
        cached.shape = ir.Shape([*dims_of(cached)[:3], wide])
    bounds = [add_constant(graph, np.array([n], np.int64), "bound") for n in (0, narrow, 3)]
    name, metadata = f"{stem}/narrow", node.metadata_props
    after = Site(graph, node, metadata, after=True).emit("Slice", [output, *bounds], name, node_name=name)
    take_over(output, after.outputs[0])
    output.name = f"{stem}/wide_output"
    output.shape = ir.Shape([*dims_of(after.outputs[0])[:3], wide])
    after.replace_input_with(0, output)


PASS = EqualWidths()
