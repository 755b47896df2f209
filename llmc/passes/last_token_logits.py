"""Logits of the last position only: the language-model head runs on one row per sequence."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.config import WeightRole
from llmc.graph.linear import find_linears
from llmc.graph.model import Graph
from llmc.graph.report import PassReport, Refusal
from llmc.passes._match import dims_of
from llmc.passes._rewrite import Site, add_constant


@dataclass(frozen=True)
class LastTokenLogits:
    name: str = "last-token-logits"
    summary: str = "the language-model head on the last position only"

    def run(self, graph: Graph) -> PassReport:
        head = next((x for x in find_linears(graph) if x.role is WeightRole.LM_HEAD), None)
        if head is None or len(dims_of(head.activation)) != 3:
            reason = "no product with a weight of (batch, sequence, hidden) leads to the logits"
            return PassReport(self.name, (), (Refusal("no-head", reason, "logits", None),))
        last = add_constant(graph.graph, np.array([-1], np.int64), "last")
        batch, _, width = dims_of(head.activation)
        chosen = Site(graph.graph, head.node).emit(
            "Gather",
            [head.activation, last],
            "last_hidden",
            attributes={"axis": 1},
            shape=[batch, 1, width],
            dtype=head.activation.dtype,
        )
        head.node.replace_input_with(0, chosen.outputs[0])
        value = head.output
        while True:
            value.shape = ir.Shape([batch, 1, *dims_of(value)[2:]])
            if value.name == "logits":
                break
            value = next(iter(value.uses())).node.outputs[0]
        graph.logits = "last"
        return PassReport(self.name, (None,))


PASS = LastTokenLogits()
