"""A layer norm spelled out (Ba et al. 2016) as one LayerNormalization, ONNX opset 17.

    y = (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + epsilon) * scale     over the last axis

torch's own `layer_norm` is one operator in the trace already; models with a norm of their own are not.
"""

from dataclasses import dataclass

from llmc.graph.model import Graph
from llmc.graph.report import PassReport
from llmc.passes._norms import replace_norms


@dataclass(frozen=True)
class LayerNorm:
    name: str = "layer-norm"
    summary: str = "spelled-out layer norms as one LayerNormalization"

    def run(self, graph: Graph) -> PassReport:
        return replace_norms(graph, self.name, "LayerNormalization", centred=True)


PASS = LayerNorm()
