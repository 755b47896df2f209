"""Fuse RMSNorm (Zhang & Sennrich 2019) into ONNX Runtime's SimplifiedLayerNormalization.

    y = x / sqrt(mean(x * x) + epsilon) * scale        over the last axis, in float32

ONNX Runtime registers SimplifiedLayerNormalization in the default domain with the attributes axis, epsilon
and stash_type (type of the mean); on the CPU, input, scale and output have the same type.
"""

from dataclasses import dataclass

from llmc.graph.model import Graph
from llmc.graph.report import PassReport
from llmc.passes._norms import replace_norms


@dataclass(frozen=True)
class RmsNorm:
    name: str = "rms-norm"
    summary: str = "RMSNorm as one SimplifiedLayerNormalization"

    def run(self, graph: Graph) -> PassReport:
        return replace_norms(graph, self.name, "SimplifiedLayerNormalization", centred=False)


PASS = RmsNorm()
