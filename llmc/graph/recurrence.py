"""Define operators that compute a layer's state token by token, by the code that a model has for one token.

Such an operator is made for one kind of layer, from the graph of one token, and called `Recurrence` with a
number. It is an ONNX scan over the tokens of a step:

    inputs   tensors with a value for each token (…, sequence, …), tensors without, and weights
             past states (batch, …); zeros at the start
             attention_mask (batch, total) int64, 1 where a token is real; its end is this step
    outputs  tensors with a value for each token, present states

A token that is not real leaves the states as they are, and its outputs mean nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from llmc.graph.body import Body
from llmc.graph.domains import DIALECT, OPSET
from llmc.graph.interface import StateKind
from llmc.graph.states import real_tokens

RECURRENCE = "Recurrence"


def is_recurrence(node: ir.Node) -> bool:
    """Return whether a node computes a state token by token."""
    return node.domain == DIALECT and node.op_type.startswith(RECURRENCE)


@dataclass(frozen=True)
class Token:
    """The computation of one token, which refers to its inputs.

    Args:
        nodes: Nodes in order.
        tokens: Inputs with a value for each token, and the axis of the tokens, whose size is 1.
        fixed: Inputs that are the same for each token.
        states: Past states.
        outputs: Outputs, and the axis of the tokens.
        presents: States after the token.
        kinds: What runtimes take each state for.
    """

    nodes: Sequence[ir.Node]
    tokens: Sequence[tuple[ir.Value, int]]
    fixed: Sequence[ir.Value]
    states: Sequence[ir.Value]
    outputs: Sequence[tuple[ir.Value, int]]
    presents: Sequence[ir.Value]
    kinds: Sequence[StateKind]


def recurrence(number: int, token: Token) -> ir.Function:
    """Define the operator of `token`, whose nodes become part of it."""
    name = f"{RECURRENCE}{number}"
    whole = [ir.Value(name=f"whole_{value.name}") for value, _ in token.tokens]
    pasts = [ir.Value(name=f"past_{value.name}") for value in token.states]
    mask = ir.Value(name="attention_mask")
    b = Body("step")
    first, axis = token.tokens[0][1], whole[0]
    real = b("Greater", real_tokens(b, mask, b("Shape", axis, start=first, end=first + 1)), b.constant(0))
    body = _scanned(token)
    axes_in = [1, *(axis for _, axis in token.tokens)]
    axes_out = [axis for _, axis in token.outputs]
    node = ir.Node(
        "",
        "Scan",
        [*pasts, real, *whole],
        [
            ir.AttrGraph("body", body),
            ir.AttrInt64("num_scan_inputs", 1 + len(whole)),
            ir.AttrInt64s("scan_input_axes", axes_in),
            ir.AttrInt64s("scan_output_axes", axes_out),
        ],
        num_outputs=len(token.states) + len(token.outputs),
    )
    b.nodes.append(node)
    for n, output in enumerate(node.outputs):
        output.name = f"result_{n}"
    presents, outputs = node.outputs[: len(token.states)], node.outputs[len(token.states) :]
    graph = ir.Graph(
        [*whole, *token.fixed, *pasts, mask],
        [*outputs, *presents],
        nodes=b.nodes,
        opset_imports={"": OPSET},
        name=name,
    )
    return ir.Function(DIALECT, name, graph=graph, attributes=[])


def _scanned(token: Token) -> ir.Graph:
    """Return the scan's body: states, whether the token is real (batch,), and the token's values.

    A runtime may let a state after the step lie where the state before it lies, so the state before is copied
    before anything is written, by an operator that no optimizer removes.
    """
    before, after = Body("before"), Body("after")
    states = [ir.Value(name=f"{value.name}_given") for value in token.states]
    real = ir.Value(name="real")
    given = [ir.Value(name=f"{value.name}_given") for value, _ in token.tokens]
    copies, columns = [], []
    for value, source in zip(token.states, states, strict=True):
        columns.append(before("Unsqueeze", real, before.constant(list(range(1, len(value.shape or ()))))))
        copies.append(before("Where", columns[-1], source, source))
        ir.convenience.replace_all_uses_with(value, copies[-1])
    for (value, axis), source in zip(token.tokens, given, strict=True):
        ir.convenience.replace_all_uses_with(value, before("Unsqueeze", source, before.constant([axis])))
    presents = [
        after("Where", column, present, copied)
        for column, present, copied in zip(columns, token.presents, copies, strict=True)
    ]
    outputs = [after("Squeeze", value, after.constant([axis])) for value, axis in token.outputs]
    return ir.Graph(
        [*states, real, *given],
        [*presents, *outputs],
        nodes=[*before.nodes, *token.nodes, *after.nodes],
        name="token",
    )
