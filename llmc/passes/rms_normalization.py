"""Fuse RMSNorm (Zhang and Sennrich 2019) into ONNX's own RMSNormalization, opset 23.

y = x / sqrt(mean(x * x) + epsilon) * scale        over the last axis, in float32
"""

from dataclasses import dataclass

from llmc.graph.domains import SINCE
from llmc.graph.edit import require_opset
from llmc.graph.model import Graph
from llmc.graph.report import PassReport
from llmc.passes._norms import replace_norms


@dataclass(frozen=True)
class RmsNormalization:
    name: str = "rms-normalization"
    summary: str = "RMSNorm as one RMSNormalization of opset 23"

    def run(self, graph: Graph) -> PassReport:
        require_opset(graph.model, SINCE["RMSNormalization"])
        return replace_norms(graph, self.name, "RMSNormalization", centred=False)


PASS = RmsNormalization()
