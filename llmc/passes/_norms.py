"""Match norms in plain operators: x divided by the root of its mean square, with or without centring."""

from dataclasses import dataclass, replace

import onnx_ir as ir

from llmc.errors import GraphError
from llmc.graph.edit import Site, drop_dead, take_over
from llmc.graph.match import (
    input_of,
    ints_of,
    is_op,
    is_scalar,
    last_dim_of,
    made_by,
    only_user,
    operand_beside,
    operands,
    rank_of,
    scalar_of,
    uncast,
)
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal
from llmc.passes._scales import Scale, scale_of, unit_scale


@dataclass(frozen=True)
class Norm:
    """A matched norm: `output` = normalised `source`, times `scale` if there is one.

    Args:
        source: Input of the norm, (…, width), before any cast to float32.
        output: Result, with the shape and type of `source`.
        width: The last dimension.
        centred: Whether the mean of `source` is subtracted first.
    """

    source: ir.Value
    output: ir.Value
    width: int
    epsilon: float
    scale: Scale | None
    centred: bool


def replace_norms(graph: Graph, name: str, operator: str, *, centred: bool) -> PassReport:
    """Replace every norm with or without centring by one `operator`; return the report of pass `name`."""
    norms, refusals = find_norms(graph, centred=centred)
    replaced: dict[ir.Value, ir.Value] = {}
    for norm, _ in norms:
        anchor, dtype = norm.output.producer(), norm.output.dtype
        if anchor is None or dtype is None:
            raise GraphError(f"norm {norm.output.name} has no element type")
        fused = Site(graph.graph, anchor).emit(
            operator,
            [replaced.get(norm.source, norm.source), _bind_scale(graph.graph, norm, dtype)],
            f"{norm.output.name}/norm",
            attributes={"axis": -1, "epsilon": norm.epsilon, "stash_type": 1},
            like=norm.output,
        )
        take_over(norm.output, fused.outputs[0])
        replaced[norm.output] = fused.outputs[0]  # a norm of a norm
    drop_dead(graph.graph)
    return PassReport(name, tuple(layer for _, layer in norms), tuple(refusals))


def _bind_scale(graph: ir.Graph, norm: Norm, dtype: ir.DataType) -> ir.Value:
    return unit_scale(graph, norm.width, dtype) if norm.scale is None else norm.scale.bind(graph, dtype)


def find_norms(graph: Graph, *, centred: bool) -> tuple[list[tuple[Norm, int | None]], list[Refusal]]:
    """Find every norm with or without centring, with its layer, and the refusals."""
    norms: list[tuple[Norm, int | None]] = []
    refusals: list[Refusal] = []
    for node in graph.graph:
        if not is_op(node, "ReduceMean"):
            continue
        x = squared(input_of(node))
        if x is None or (_origin_of_centred(x) is not None) is not centred:
            continue
        norm = match_norm(node)
        if isinstance(norm, Norm):
            norms.append((norm, layer_of(node)))
        elif norm is not None:
            refusals.append(Refusal("norm-form", norm, str(node.name), layer_of(node)))
    return norms, refusals


def squared(value: ir.Value | None) -> ir.Value | None:
    """Return x if `value` is x * x or x ** 2."""
    if (power := made_by(value, "Pow")) is not None and is_scalar(input_of(power, 1), 2.0):
        return input_of(power)
    if (product := made_by(value, "Mul")) is not None and product.inputs[0] is product.inputs[1]:
        return input_of(product)
    return None


def _origin_of_centred(value: ir.Value) -> ir.Value | None:
    """Return x if `value` is x - mean(x) over the last axis."""
    difference = made_by(value, "Sub")
    mean = made_by(input_of(difference, 1), "ReduceMean") if difference is not None else None
    if difference is None or mean is None or mean.inputs[0] is not difference.inputs[0]:
        return None
    return difference.inputs[0] if _over_last_axis(mean) else None


def _over_last_axis(mean: ir.Node) -> bool:
    rank, axes = rank_of(input_of(mean)), ints_of(input_of(mean, 1))
    last = axes is not None and [a % rank for a in axes] == [rank - 1]
    return last and mean.attributes.get_int("keepdims", 1) == 1


def match_norm(mean: ir.Node) -> Norm | str | None:
    """Match the norm around the mean of squares `mean`; a string gives the reason why a norm was refused.

    Return None if nothing divides by the root of the mean: a mean of squares alone is not a norm.
    """
    x = squared(input_of(mean))
    root = _inverse_root(mean.outputs[0])
    if x is None or root is None:
        return None
    width = last_dim_of(x)
    if not _over_last_axis(mean) or width is None:
        axes = ints_of(input_of(mean, 1))
        return f"the mean is over axes {axes} of {rank_of(x)}, not only over a static last one"
    epsilon, factor, divides = root
    scaled = only_user(factor)
    if scaled is None or not is_op(scaled, "Div" if divides else "Mul"):
        return "the inverse root is not used by one product alone"
    numerator = scaled.inputs[0] if divides else operand_beside(scaled, factor)
    if numerator is None or uncast(numerator) is not uncast(x):
        return "the inverse root does not scale the tensor that it was computed from"
    origin = _origin_of_centred(x)
    norm = Norm(origin or x, scaled.outputs[0], width, epsilon, None, origin is not None)
    return _with_scale(norm)


def _inverse_root(mean: ir.Value) -> tuple[float, ir.Value, bool] | None:
    """Return (epsilon, value, whether it is a divisor) for the (inverse) root of mean + epsilon."""
    epsilon, value = 0.0, mean
    add = only_user(value)
    if add is not None and is_op(add, "Add"):
        number = scalar_of(operand_beside(add, value))
        if number is None:
            return None
        epsilon, value = number, add.outputs[0]
    root = only_user(value)
    if root is None:
        return None
    if is_op(root, "Pow") and root.inputs[0] is value and is_scalar(input_of(root, 1), -0.5):
        return epsilon, root.outputs[0], False
    if not is_op(root, "Sqrt"):
        return None
    value = root.outputs[0]
    inverse = only_user(value)
    if inverse is None:
        return None
    if is_op(inverse, "Reciprocal"):
        return epsilon, inverse.outputs[0], False
    if not is_op(inverse, "Div") or inverse.inputs[1] is not value:
        return None
    if is_scalar(inverse.inputs[0], 1.0):
        return epsilon, inverse.outputs[0], False
    return epsilon, value, True


def _with_scale(norm: Norm) -> Norm | str:
    """Extend `norm` by the product with its weight, and the casts on either side of it."""
    output, scale = _after_cast(norm.output), norm.scale
    user = only_user(output)
    if user is not None and is_op(user, "Mul"):
        for one, other in operands(user):
            if one is output and (weight := scale_of(other, norm.width)) is not None:
                scale, output = weight, _after_cast(user.outputs[0])
                break
    origin = uncast(norm.source)
    source = origin if origin.dtype == output.dtype else norm.source
    if source.dtype != output.dtype:
        return f"the norm takes {source.dtype} and gives {output.dtype}"
    return replace(norm, source=source, output=output, scale=scale)


def _after_cast(value: ir.Value) -> ir.Value:
    user = only_user(value)
    if user is not None and is_op(user, "Cast") and uncast(user.outputs[0]) is uncast(value):
        return user.outputs[0]
    return value
