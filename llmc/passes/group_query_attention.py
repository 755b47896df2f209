"""Lower `CachedAttention` to com.microsoft GroupQueryAttention (Ainslie et al. 2023).

The operator keeps the tokens of each batch row contiguous from slot 0: it takes the number of real tokens of
each row instead of a mask, and appends at the row's own end. Ragged batches are therefore padded on the
right, and positions are the ones that the mask implies. Its sliding window, softcap and sinks have the same
meaning as in the dialect. If query and key come from rotary embeddings with the same tables, the operator
rotates them itself; it then derives the positions itself, and `position_ids` may be removed from the inputs.
An embedding whose positions are shifted as a whole, beyond a switch of its frequencies, passes its positions
to the operator.

Layers that share a cache slot (Gemma 3n, 2025) are lowered together, or not at all: in a ragged batch, the
operator and the dialect store tokens in different slots. The layer that owns the slot appends to it; each
other layer takes the owner's present as its past, and no new keys. It has no present of its own, so that
nothing is copied. Chunks are a bias that hides all other chunks.

Limits of ONNX Runtime 1.31 on a CPU: several tokens at once on a past that is not empty need a batch of 1;
head widths are multiples of 8; tables of a rotary embedding have a multiple of 8 columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.errors import GraphError
from llmc.graph import dialect
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.edit import Site, add_constant, drop_dead, drop_unused_functions, require_domain, take_over
from llmc.graph.match import dims_of, find_nodes, is_op, made_by, only_user, operand
from llmc.graph.model import CHUNK, Graph, layer_of
from llmc.graph.report import PassReport, Refusal
from llmc.passes._heads import HeadLayout
from llmc.passes._step import StepValues

OPERATOR = "GroupQueryAttention"
_WIDTH_MULTIPLE = 8


@dataclass(frozen=True)
class GroupQueryAttention:
    name: str = "group-query-attention"
    summary: str = "attention as one GroupQueryAttention, with the rotary embedding inside if possible"

    def run(self, graph: Graph) -> PassReport:
        applied: list[int | None] = []
        refusals: list[Refusal] = []
        outside: dict[str, int] = {}
        nodes = find_nodes(graph.graph, dialect.CACHED_ATTENTION, DIALECT)
        step = StepValues(graph.graph) if nodes else None
        owners: dict[ir.Value, ir.Node] = {}
        reasons = {operand(n, 3): why for n in nodes if (why := _decline(n)) is not None}
        for node in nodes:
            declined = reasons.get(operand(node, 3))
            if declined is not None or step is None:
                refusals.append(Refusal(*(declined or ("", "")), str(node.name), layer_of(node)))
                continue
            reason = _rewrite(graph.graph, node, step, owners)
            if reason is not None:
                outside[reason] = outside.get(reason, 0) + 1
            applied.append(layer_of(node))
        drop_dead(graph.graph)
        refusals += _uncaptured(graph, {r.layer for r in refusals} | set(applied))
        if applied:
            graph.padding = "right" if graph.padding in ("any", "right") else "none"
            drop_unused_functions(graph.model)
            require_domain(graph.graph, MICROSOFT)
            _drop_unused_positions(graph)
        for reason, count in outside.items():
            graph.notes.append(f"the rotary embedding stays outside attention in {count} layers: {reason}")
        layers = {layer for layer in (*applied, *(r.layer for r in refusals)) if layer is not None}
        return PassReport(self.name, tuple(applied), tuple(refusals), frozenset(layers))


def _uncaptured(graph: Graph, captured: set[int | None]) -> Iterator[Refusal]:
    """Yield a refusal for each layer with a KV cache whose attention is in plain operators."""
    for slot in graph.cache:
        if slot.layer not in captured:
            reason = "the layer computes attention in plain operators"
            yield Refusal("plain-attention", reason, slot.past_key, slot.layer)


def _decline(node: ir.Node) -> tuple[str, str] | None:
    """Return (code, reason) if the operator cannot replace `node`."""
    past_key, past_value = node.inputs[3], node.inputs[4]
    if past_key is None or past_value is None:
        raise GraphError(f"attention {node.name} has no past")
    key_width, value_width = dims_of(past_key)[-1], dims_of(past_value)[-1]
    if key_width != value_width:
        return (
            "value-width",
            f"keys are {key_width} wide and values {value_width}; the operator takes one width",
        )
    if not isinstance(key_width, int) or key_width % _WIDTH_MULTIPLE:
        return "head-width", f"heads are {key_width} wide; the operator takes multiples of {_WIDTH_MULTIPLE}"
    if node.attributes.get_int("chunk", 0) and node.attributes["softcap"].as_float():
        return "chunk", "chunks are a bias, which the operator caps as it caps scores"
    return None


@dataclass(frozen=True)
class _Rotary:
    """The tables (positions, rotated / 2) of a rotary embedding that the operator applies itself.

    `positions` are the table rows for each token; None if they are the tokens' own positions.
    """

    cos: ir.Value
    sin: ir.Value
    interleaved: int
    positions: ir.Value | None


def _shared_rotary(query: ir.Value, key: ir.Value) -> tuple[_Rotary | None, str | None]:
    """Return the rotary embedding of both, if the operator can apply it; else the reason, if there is one."""
    nodes = [made_by(v, "RotaryEmbedding", MICROSOFT) for v in (query, key)]
    first, second = nodes
    if first is None or second is None:
        return None, "only one of query and key is rotated" if first or second else None
    same = first.inputs[1:] == second.inputs[1:] and all(
        first.attributes.get_int(n, 0) == second.attributes.get_int(n, 0)
        for n in ("interleaved", "rotary_embedding_dim")
    )
    _, positions, cos, sin = first.inputs
    if not same or cos is None or sin is None:
        return None, "query and key are rotated by different tables"
    if positions is None or not _are_positions(positions):
        return None, "positions are not the input position_ids"
    columns = dims_of(cos)[-1]
    if not isinstance(columns, int) or columns % _WIDTH_MULTIPLE:
        return None, f"its tables have {columns} columns; the operator takes multiples of {_WIDTH_MULTIPLE}"
    shifted = None if positions.is_graph_input() else positions
    return _Rotary(cos, sin, first.attributes.get_int("interleaved", 0), shifted), None


def _are_positions(value: ir.Value) -> bool:
    """Return whether `value` is the input position_ids, possibly shifted by one number for all tokens."""
    if (shifted := made_by(value, "Add")) is not None:
        source, shift = shifted.inputs
        return source is not None and _are_positions(source) and shift is not None and not dims_of(shift)
    return value.name == "position_ids" and value.is_graph_input()


def _rewrite(graph: ir.Graph, node: ir.Node, step: StepValues, owners: dict[ir.Value, ir.Node]) -> str | None:
    """Replace `node`; return the reason if a rotary embedding stays outside.

    Args:
        owners: The operator that extends each past; it gains the one of `node` if none does yet.
    """
    query, key, value, past_key, past_value = (operand(node, i) for i in range(5))
    owner = owners.get(past_key)
    heads, kv_heads = (node.attributes.get_int(n, 0) for n in ("num_heads", "kv_num_heads"))
    width = int(str(dims_of(past_key)[-1]))
    rotary, outside = _shared_rotary(query, query if owner else key)
    if rotary is not None:
        query = _before_rotary(query)
        key = key if owner else _before_rotary(key)
    site, stem = Site(graph, node), str(node.name)
    flat = [HeadLayout(site, f"{stem}/query", heads, width).flatten(query)]
    if owner is None:
        layouts = [HeadLayout(site, f"{stem}/{n}", kv_heads, width) for n in ("key", "value")]
        flat += [layout.flatten(v) for layout, v in zip(layouts, (key, value), strict=True)]
        pasts = [past_key, past_value]
    else:
        flat += [step.empty(kv_heads * width, past_key.dtype or ir.DataType.FLOAT)] * 2
        pasts = list(owner.outputs[1:])
    fused = site.emit(
        OPERATOR,
        _inputs(node, [*flat, *pasts, *step.lengths()], rotary, step),
        f"{stem}/output",
        domain=MICROSOFT,
        attributes=_attributes(node, rotary),
        shape=[*dims_of(query)[:1], dims_of(node.outputs[0])[1], heads * width],
        dtype=query.dtype,
        outputs=3 if owner is None else 1,
    )
    if chunk := node.attributes.get_int("chunk", 0):
        fused.metadata_props[CHUNK] = str(chunk)
    if owner is None:
        owners[past_key] = fused
        for old, new in zip(node.outputs[1:], fused.outputs[1:], strict=True):
            take_over(old, new)
    _replace_output(site, node.outputs[0], fused.outputs[0], heads * width)
    return outside


def _attributes(node: ir.Node, rotary: _Rotary | None) -> dict[str, int | float]:
    attributes: dict[str, int | float] = {
        "num_heads": node.attributes.get_int("num_heads", 0),
        "kv_num_heads": node.attributes.get_int("kv_num_heads", 0),
        "scale": node.attributes["scale"].as_float(),
        "local_window_size": node.attributes.get_int("window", 0) or -1,
    }
    if softcap := node.attributes["softcap"].as_float():
        attributes["softcap"] = softcap
    if rotary is not None:
        attributes |= {"do_rotary": 1, "rotary_interleaved": rotary.interleaved}
    return attributes


def _inputs(
    node: ir.Node, required: list[ir.Value], rotary: _Rotary | None, step: StepValues
) -> list[ir.Value | None]:
    """List the operator's inputs: the required ones, tables, positions, bias and sinks."""
    optional: list[ir.Value | None] = [None] * 5
    if rotary is not None:
        optional[:3] = rotary.cos, rotary.sin, rotary.positions
    if chunk := node.attributes.get_int("chunk", 0):
        optional[3] = step.other_chunks(chunk, required[0].dtype or ir.DataType.FLOAT)
    if len(node.inputs) > 6:
        optional[4] = node.inputs[6]
    while optional and optional[-1] is None:
        optional.pop()
    return [*required, *optional]


def _before_rotary(value: ir.Value) -> ir.Value:
    source = made_by(value, "RotaryEmbedding", MICROSOFT)
    if source is None or source.inputs[0] is None:
        raise GraphError(f"{value.name} is not made by a rotary embedding")
    return source.inputs[0]


def _replace_output(site: Site, old: ir.Value, new: ir.Value, features: int) -> None:
    """Let users of `old` (batch, sequence, heads, width) read `new` (batch, sequence, features)."""
    user = only_user(old)
    if user is not None and is_op(user, "Reshape") and dims_of(user.outputs[0]) == dims_of(new):
        take_over(user.outputs[0], new)
        return
    dims = dims_of(old)
    target = add_constant(site.graph, np.array([0, 0, *dims[2:]], np.int64), "shape")
    take_over(old, site.emit("Reshape", [new, target], f"{new.name}/heads", like=old).outputs[0])


def _drop_unused_positions(graph: Graph) -> None:
    for value in list(graph.graph.inputs):
        if value.name == "position_ids" and not value.uses():
            graph.graph.inputs.remove(value)


PASS = GroupQueryAttention()
