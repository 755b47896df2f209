"""Compute logits of each row's last token only: the language-model head runs on one position per sequence.

A row of a ragged batch that is padded on the right ends before the last slot of the step. Its last token is
at the last 1 in the attention mask of the step's own slots, the last `sequence` of `total`. A graph with a
KV cache of fixed length has no mask: it gets the input token_counts (batch,) int64 instead.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.config import WeightRole
from llmc.graph.edit import Site, add_constant
from llmc.graph.interface import CHOSEN_TOKENS, TOKEN_COUNTS, WRITE_INDICES
from llmc.graph.linear import find_linears
from llmc.graph.match import dims_of
from llmc.graph.model import Graph
from llmc.graph.report import PassReport, Refusal
from llmc.passes._step import count_slots


@dataclass(frozen=True)
class LastTokenLogits:
    name: str = "last-token-logits"
    summary: str = "the language-model head on each row's last token only"

    def run(self, graph: Graph) -> PassReport:
        head = next((x for x in find_linears(graph) if x.role is WeightRole.LM_HEAD), None)
        if head is None or len(dims_of(head.activation)) != 3:
            reason = "no product with a weight of (batch, sequence, hidden) leads to the logits"
            return PassReport(self.name, (), (Refusal("no-head", reason, "logits", None),))
        batch, _, width = dims_of(head.activation)
        site = Site(graph.graph, head.node)
        chosen = site.emit(
            "GatherND",
            [head.activation, _last_tokens(graph, site)],
            "last_hidden",
            attributes={"batch_dims": 1},
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


def _last_tokens(graph: Graph, site: Site) -> ir.Value:
    """Emit the slot of each row's last token among the slots of this step, int64 (batch, 1, 1)."""
    inputs = {value.name: value for value in graph.graph.inputs}
    ids = inputs["input_ids"]
    batch, sequence = dims_of(ids)

    def constant(*numbers: int) -> ir.Value:
        return add_constant(graph.graph, np.array(numbers, np.int64), "axis")

    if WRITE_INDICES in inputs:
        counts = ir.val(TOKEN_COUNTS, ir.DataType.INT64, [batch])
        graph.graph.inputs.insert(list(graph.graph.inputs).index(inputs[WRITE_INDICES]) + 1, counts)
        last = site.emit("Sub", [counts, constant(1)], "last/slot", like=counts)
        dims = [batch, 1, 1]
        chosen = site.emit(
            "Unsqueeze", [last.outputs[0], constant(1, 2)], CHOSEN_TOKENS, shape=dims, dtype=counts.dtype
        )
        return chosen.outputs[0]
    mask = inputs["attention_mask"]

    length = site.emit(
        "Shape", [ids], "last/length", attributes={"start": 1, "end": 2}, shape=[1], dtype=ir.DataType.INT64
    )
    start = site.emit("Neg", [length.outputs[0]], "last/start", like=length.outputs[0])
    own = site.emit(
        "Slice",
        [mask, start.outputs[0], constant(np.iinfo(np.int64).max), constant(1)],
        "last/mask",
        shape=[batch, sequence],
        dtype=mask.dtype,
    )
    slot = count_slots(site, own.outputs[0], "last", before=True)
    index = site.emit(
        "Unsqueeze",
        [slot, constant(2)],
        CHOSEN_TOKENS,
        shape=[batch, 1, 1],
        dtype=slot.dtype,
    )
    return index.outputs[0]


PASS = LastTokenLogits()
