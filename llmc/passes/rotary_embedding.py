"""Fuse rotary position embeddings (Su et al. 2021) into ONNX's own RotaryEmbedding, opset 23.

It differs from com.microsoft's operator only in the order of its inputs.
"""

from dataclasses import dataclass

import onnx_ir as ir

from llmc.graph.domains import SINCE
from llmc.graph.edit import Site, require_opset
from llmc.graph.model import Graph
from llmc.graph.report import PassReport
from llmc.passes.rotary import replace_rotations

OPERATOR = "RotaryEmbedding"


@dataclass(frozen=True)
class RotaryEmbedding:
    name: str = "rotary-embedding"
    summary: str = "rotary position embeddings as one RotaryEmbedding of opset 23"

    def run(self, graph: Graph) -> PassReport:
        require_opset(graph.model, SINCE[OPERATOR])
        return replace_rotations(graph, self.name, _emit)


def _emit(
    site: Site, value: ir.Value, positions: ir.Value, tables: list[ir.Value], attributes: dict[str, int]
) -> ir.Node:
    inputs = [value, *tables, positions]
    return site.emit(OPERATOR, inputs, f"{value.name}/rotary", attributes=attributes, like=value)


PASS = RotaryEmbedding()
