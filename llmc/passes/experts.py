"""Lower `Experts` to com.microsoft MoE, which computes only the chosen experts.

MoE does its own routing: it takes the k largest router logits of a row, and mixes by their softmax. Logits
that are log(weight) for the chosen experts and minus infinity for the others reproduce the router's choice,
however it was made, and the weights divided by their sum; a product with the sum follows. Weights must not
be negative. In float16 the logits are log(weight / largest weight), of which the large weights have the
smallest, and so the least rounded.

Limits of ONNX Runtime 1.31 on a CPU: the only gated experts are SwiGLU with gate and up interleaved, without
a third matrix, so weights are interleaved as they are written. In float16 it returns zeros unless it is told
to divide the weights by their sum, which is 1 here anyway. Its MoE may receive its own input's memory
for the output, and then reads what it has overwritten: a `Where` after it keeps the input alive until it is
done.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.errors import GraphError
from llmc.graph import dialect
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.edit import (
    Site,
    add_constant,
    add_weight,
    drop_dead,
    drop_unused_functions,
    set_value,
    take_over,
)
from llmc.graph.match import constant_of, dims_of, find_nodes, is_op, made_by, permutation_of
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal
from llmc.graph.weights import ExpertRows, LazyWeight, Rows

OPERATOR = "MoE"
_INT64 = ir.DataType.INT64
#: Features in 16 bytes of float16, which ONNX Runtime's kernels for CUDA read at once.
_ALIGNED = 8


@dataclass(frozen=True)
class Experts:
    name: str = "experts"
    summary: str = "a layer of experts as one MoE, which computes the chosen ones only"

    def run(self, graph: Graph) -> PassReport:
        applied: list[int | None] = []
        refusals: list[Refusal] = []
        for node in find_nodes(graph.graph, dialect.EXPERTS, DIALECT):
            declined = _decline(node)
            if declined is not None:
                refusals.append(Refusal(*declined, str(node.name), layer_of(node)))
                continue
            _rewrite(graph.graph, node)
            applied.append(layer_of(node))
        drop_dead(graph.graph)
        drop_unused_functions(graph.model)
        return PassReport(self.name, tuple(applied), tuple(refusals))


def _decline(node: ir.Node) -> tuple[str, str] | None:
    """Return (code, reason) why `node` cannot be lowered; None if it can."""
    _, indices, weights, *parameters = node.inputs
    if _topk(indices) is None:
        return "routing", "its experts are not the result of a TopK, so one might be chosen twice"
    if not _is_nonnegative(weights):
        return "signed-weights", "the router's weights are not known to be at least 0"
    if any(_stored(value) is None for value in parameters):
        return "computed", "the experts' weights are computed, not stored"
    sizes = dims_of(parameters[1])[1:]
    if node.outputs[0].dtype is ir.DataType.FLOAT16 and any(int(str(size)) % _ALIGNED for size in sizes):
        return (
            "width",
            f"in float16 the operator takes multiples of {_ALIGNED} features, here {sizes[0]} and {sizes[1]}",
        )
    return None


def _topk(value: ir.Value | None) -> ir.Node | None:
    """Return the TopK that chose experts, given its indices."""
    while (step := None if value is None else value.producer()) is not None:
        if is_op(step, "TopK"):
            return step if value is step.outputs[1] else None
        if step.op_type not in ("Cast", "Reshape"):
            return None
        value = step.inputs[0]
    return None


#: Operators whose result is at least 0: for any operands, if all of their operands are, and if the first one
#: is.
_ALWAYS = frozenset({"Softmax", "Sigmoid", "Exp", "Relu", "Softplus", "Abs"})
_TOGETHER = frozenset({"Add", "Mul", "Div", "Max", "Min", "Concat"})
_FORWARDED = frozenset(
    {"TopK", "Gather", "GatherElements", "Reshape", "Cast", "Slice", "Transpose", "Unsqueeze", "Squeeze"}
    | {"Expand", "ReduceSum", "ReduceMax", "Identity", "Sqrt"}
)  # fmt: skip


def _is_nonnegative(value: ir.Value | None) -> bool:
    """Return whether the operators that compute `value` cannot give a number below 0."""
    if value is None:
        return False
    constant = constant_of(value)
    if constant is not None:
        return bool((constant.numpy() >= 0).all())
    node = value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type in _TOGETHER:
        return all(_is_nonnegative(v) for v in node.inputs)
    if node.op_type == "Clip":
        bounds = [v for v in node.inputs[1:] if v is not None]
        raised = len(node.inputs) > 1 and node.inputs[1] is not None
        return all(_is_nonnegative(v) for v in bounds) and (raised or _is_nonnegative(node.inputs[0]))
    return node.op_type in _ALWAYS or (node.op_type in _FORWARDED and _is_nonnegative(node.inputs[0]))


@dataclass(frozen=True)
class _Stored:
    """A weight of the checkpoint, and how experts read it: see `ExpertRows`."""

    tensor: LazyWeight
    rows: Rows
    transposed: bool
    doubled: bool


def _stored(value: ir.Value | None) -> _Stored | None:
    """Return the weight of the checkpoint that `value` is; None if it is computed otherwise."""
    twice = made_by(value, "Concat")
    doubled = (
        twice is not None
        and len(twice.inputs) == 2
        and twice.inputs[0] is twice.inputs[1]
        and twice.attributes["axis"].as_int() == 1
    )
    if doubled and twice is not None:
        value = twice.inputs[0]
    turned = made_by(value, "Transpose")
    transposed = turned is not None and permutation_of(turned) == [0, 2, 1]
    source = turned.inputs[0] if transposed and turned is not None else value
    tensor = None if source is None else source.const_value
    if not isinstance(tensor, LazyWeight) or tensor.rows is None:
        return None
    return _Stored(tensor, tensor.rows, transposed, doubled)


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    hidden, indices, weights, gate_up, down, *biases = node.inputs
    site, stem = Site(graph, node), str(node.name)
    apart = not node.attributes.get_int("interleaved", 0)
    matrices = [_weight(graph, gate_up, apart), _weight(graph, down, False)]
    if biases:
        offsets: list[ir.Value | None] = [_weight(graph, biases[0], apart), _weight(graph, biases[1], False)]
    else:
        offsets = [None, None]
    output = node.outputs[0]
    dtype = output.dtype or ir.DataType.FLOAT
    experts = int(str(dims_of(matrices[0])[0]))
    logits = _logits(site, stem, indices, _logarithms(site, stem, weights, dtype), experts)
    total = _total(site, stem, weights, dtype)
    attributes: dict[str, int | float | str] = {
        "k": int(str(dims_of(indices)[1])),
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
        "activation_alpha": node.attributes["alpha"].as_float(),
        "activation_beta": node.attributes["beta"].as_float(),
    }
    if limit := node.attributes["limit"].as_float():
        attributes["swiglu_limit"] = limit
    inputs = [hidden, logits, matrices[0], offsets[0], matrices[1], offsets[1]]
    while inputs[-1] is None:
        inputs.pop()
    mixed = site.emit(
        OPERATOR, inputs, f"{stem}/mixed", domain=MICROSOFT, attributes=attributes, like=output
    ).outputs[0]
    scaled = site.emit("Mul", [mixed, total], f"{stem}/scaled", like=output).outputs[0]
    never = add_constant(graph, np.array(False), "never")
    take_over(output, site.emit("Where", [never, hidden, scaled], f"{stem}/output", like=output).outputs[0])


def _weight(graph: ir.Graph, value: ir.Value | None, interleave: bool) -> ir.Value:
    """Return the stored weight in the layout that MoE reads."""
    weight = _stored(value)
    if weight is None:
        raise GraphError(f"experts read {value.name if value else 'nothing'}, which is not stored")
    if not (weight.transposed or weight.doubled or interleave) and value is not None:
        return value
    rows = ExpertRows(weight.rows, weight.transposed, interleave, weight.doubled)
    return add_weight(graph, f"{weight.tensor.name}.experts", rows)


def _logarithms(site: Site, stem: str, weights: ir.Value | None, dtype: ir.DataType) -> ir.Value:
    """Emit the logarithms of the chosen experts' weights, (tokens, k), up to a number that a row shares."""
    if dtype is ir.DataType.FLOAT16:
        one = add_constant(site.graph, np.array([1], np.int64), "largest")
        # ReduceMax would need cuDNN on CUDA.
        most = site.emit(
            "TopK", [weights, one], f"{stem}/most", like=weights, shape=_rows(weights), outputs=2
        )
        set_value(most.outputs[1], f"{stem}/most_at", _rows(weights), _INT64)
        relative = site.emit("Div", [weights, most.outputs[0]], f"{stem}/relative", like=weights)
        weights = relative.outputs[0]
    logarithms = site.emit("Log", [weights], f"{stem}/log", like=weights).outputs[0]
    return _cast(site, f"{stem}/log_cast", logarithms, dtype)


def _logits(site: Site, stem: str, indices: ir.Value | None, logarithms: ir.Value, experts: int) -> ir.Value:
    """Emit router logits, (tokens, experts): those of chosen experts, and minus infinity for the others."""
    dtype = logarithms.dtype or ir.DataType.FLOAT
    length = site.emit(
        "Shape", [indices], f"{stem}/tokens", attributes={"start": 0, "end": 1}, shape=[1], dtype=_INT64
    ).outputs[0]
    width = add_constant(site.graph, np.array([experts], np.int64), "shape")
    shape = site.emit(
        "Concat", [length, width], f"{stem}/shape", attributes={"axis": 0}, shape=[2], dtype=_INT64
    ).outputs[0]
    nowhere = add_constant(site.graph, np.array([-np.inf], dtype.numpy()), "minus_infinity")
    size = [dims_of(indices)[0], experts]
    nothing = site.emit("Expand", [nowhere, shape], f"{stem}/nothing", shape=size, dtype=dtype).outputs[0]
    inputs = [nothing, indices, logarithms]
    return site.emit(
        "ScatterElements", inputs, f"{stem}/logits", attributes={"axis": 1}, shape=size, dtype=dtype
    ).outputs[0]


def _total(site: Site, stem: str, weights: ir.Value | None, dtype: ir.DataType) -> ir.Value:
    """Emit the sum of the chosen experts' weights, (tokens, 1)."""
    total = site.emit(
        "ReduceSum", [weights, _last(site)], f"{stem}/total", like=weights, shape=_rows(weights)
    )
    return _cast(site, f"{stem}/total_cast", total.outputs[0], dtype)


def _last(site: Site) -> ir.Value:
    return add_constant(site.graph, np.array([-1], np.int64), "axis")


def _rows(value: ir.Value | None) -> list[int | str]:
    return [dims_of(value)[0], 1]


def _cast(site: Site, name: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return `value` in a type."""
    if value.dtype in (None, dtype):
        return value
    return site.emit("Cast", [value], name, attributes={"to": int(dtype)}, like=value, dtype=dtype).outputs[0]


PASS = Experts()
