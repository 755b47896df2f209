"""Fuse a layer norm in plain operators (Ba et al. 2016) into one LayerNormalization, ONNX opset 17.

    y = (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + epsilon) * scale     over the last axis

In the trace, torch's own `layer_norm` is already one operator; norms that models implement are not.
"""

from dataclasses import dataclass

from llmc.graph.model import Graph
from llmc.graph.report import PassReport
from llmc.passes._norms import replace_norms


@dataclass(frozen=True)
class LayerNorm:
    name: str = "layer-norm"
    summary: str = "layer norms in plain operators as one LayerNormalization"

    def run(self, graph: Graph) -> PassReport:
        return replace_norms(graph, self.name, "LayerNormalization", centred=True)


PASS = LayerNorm()
