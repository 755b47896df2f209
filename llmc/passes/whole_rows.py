"""Tokens keep their batch and sequence where a model reshapes them to rows for operators over the features.

    Reshape (batch, sequence, width) -> (rows, width), operators over the features, Reshape back

OPT computes its feed-forward layers this way. Without the two Reshapes, a residual sum and the norm behind it
are one operator, and compiled kernels take the layer. Rows that something else reads, such as the routing of
experts, stay.
"""

from dataclasses import dataclass

import onnx_ir as ir

from llmc.graph.edit import drop_dead
from llmc.graph.linear import as_linear
from llmc.graph.match import dims_of, is_op, operand, rank_of
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Relu", "Sigmoid", "Tanh", "Gelu", "Cast"})


@dataclass(frozen=True)
class WholeRows:
    name: str = "whole-rows"
    summary: str = "no Reshape of tokens to rows around operators over the features"

    def run(self, graph: Graph) -> PassReport:
        applied: list[int | None] = []
        refusals: list[Refusal] = []
        starts = [node for node in graph.graph if _is_start(node)]
        whole = _rows_of(graph.graph, starts)
        readers = _drop_read_otherwise(whole)
        for node in starts:
            reader = readers.get(node.outputs[0])
            if reader is None:
                applied.append(layer_of(node))
            else:
                refusals.append(Refusal("rows", f"its rows lead to {reader}", str(node.name), layer_of(node)))
        _rewrite(whole)
        drop_dead(graph.graph)
        return PassReport(self.name, tuple(applied), tuple(refusals))


def _is_start(node: ir.Node) -> bool:
    """Whether `node` is a Reshape that joins batch and sequence to rows."""
    if not is_op(node, "Reshape"):
        return False
    before, after = dims_of(node.inputs[0]), dims_of(node.outputs[0])
    return len(before) == 3 and len(after) == 2 and before[0] == "batch" and before[2] == after[1]


def _is_end(node: ir.Node, tokens: list[int | str], value: ir.Value) -> bool:
    """Whether `node` is a Reshape that gives the rows of `value` their batch and sequence back."""
    output = node.outputs[0]
    same = dims_of(output) == [*tokens, dims_of(value)[-1]]
    return is_op(node, "Reshape") and node.inputs[0] is value and same and not output.is_graph_output()


def _rows_of(graph: ir.Graph, starts: list[ir.Node]) -> dict[ir.Value, list[int | str]]:
    """(batch, sequence) of each value that is rows made from `starts` by operators over the features."""
    found = {node.outputs[0]: dims_of(node.inputs[0])[:2] for node in starts}
    for node in graph:
        rows = [value for value in node.inputs if value is not None and value in found]
        if rows and _is_over_features(node, rows) and len({tuple(found[value]) for value in rows}) == 1:
            found[node.outputs[0]] = found[rows[0]]
    return found


def _is_over_features(node: ir.Node, rows: list[ir.Value]) -> bool:
    """Whether an operator treats each row of `rows` alone, and reads nothing else that has rows."""
    others = [value for value in node.inputs if value is not None and value not in rows]
    if rank_of(node.outputs[0]) != 2 or len(node.outputs) != 1 or node.domain != "":
        return False
    if node.op_type == "LayerNormalization":
        return node.attributes.get_int("axis", -1) == -1 and rows == [node.inputs[0]]
    if node.op_type == "MatMul":
        return as_linear(node) is not None
    vectors = all(value.shape is not None and rank_of(value) < 2 for value in others)
    return node.op_type in _ELEMENTWISE and vectors


def _drop_read_otherwise(whole: dict[ir.Value, list[int | str]]) -> dict[ir.Value, str]:
    """Remove the values that something else reads and those beside and before them; what reads each."""
    readers: dict[ir.Value, str] = {}
    while lost := {v: r for v, tokens in whole.items() if (r := _reader(v, tokens, whole, readers))}:
        readers |= lost
        for value in lost:
            del whole[value]
    return readers


def _reader(
    value: ir.Value,
    tokens: list[int | str],
    whole: dict[ir.Value, list[int | str]],
    readers: dict[ir.Value, str],
) -> str | None:
    """What keeps `value` from having its batch and sequence; None if nothing does."""
    if value.is_graph_output():
        return "an output of the graph"
    for user in value.consumers():
        if not _is_end(user, tokens, value) and user.outputs[0] not in whole:
            return readers.get(user.outputs[0], f"{user.op_type} {user.name}")
    made = value.producer()
    sources = [] if made is None or is_op(made, "Reshape") else made.inputs
    return next((readers[source] for source in sources if source in readers), None)


def _rewrite(whole: dict[ir.Value, list[int | str]]) -> None:
    """Give values their batch and sequence, and let what reads Reshapes of them read them."""
    for value, tokens in whole.items():
        ends = [user for user in value.consumers() if _is_end(user, tokens, value)]
        start, kept = value.producer(), value
        if start is not None and _is_start(start):
            kept = operand(start, 0)
            ir.convenience.replace_all_uses_with(value, kept)
        else:
            value.shape = ir.Shape([*tokens, dims_of(value)[-1]])
        for end in ends:
            ir.convenience.replace_all_uses_with(end.outputs[0], kept)


PASS = WholeRows()
