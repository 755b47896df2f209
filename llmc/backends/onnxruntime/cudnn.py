"""Tell which operators of a graph ONNX Runtime's CUDA provider leaves to cuDNN.

It loads cuDNN when the first of them runs, and fails there without it; nothing else needs cuDNN. The table
was found by running each operator of 1.31.1 on its own; `tests/test_cuda_kernels.py` holds it.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from llmc.graph.domains import STANDARD
from llmc.graph.match import dims_of, input_of, ints_of, made_by, rank_of

_ALWAYS = frozenset({
    "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "Einsum", "GlobalAveragePool",
    "GlobalMaxPool", "InstanceNormalization", "MaxPool", "ReduceL1", "ReduceL2", "ReduceLogSumExp",
    "ReduceMax", "ReduceMin", "ReduceProd",
})  # fmt: skip
#: Reductions with kernels of their own over the first axes and over the last.
_INNER = frozenset({"ReduceLogSum", "ReduceMean", "ReduceSumSquare"})


def needs_cudnn(model: ir.Model) -> str | None:
    """Say which operators of a graph need cuDNN; None if it runs without it."""
    owners: Iterable[ir.Graph | ir.Function] = (model.graph, *model.functions.values())
    names = sorted({node.op_type for owner in owners for node in owner.all_nodes() if _is_left(node)})
    if not names:
        return None
    return f"{' and '.join(names)} of this graph need cuDNN 9 on the GPU: pip install nvidia-cudnn-cu13"


def _is_left(node: ir.Node) -> bool:
    if node.domain != STANDARD:
        return False
    if node.op_type == "Softmax":
        return _has_bias(node)
    return node.op_type in _ALWAYS or (node.op_type in _INNER and not _at_an_end(node))


def _has_bias(softmax: ir.Node) -> bool:
    """Return whether ONNX Runtime makes one BiasSoftmax of an addition and a Softmax over the last axis.

    It does if one operand is broadcast along the first axes alone, or along all from some axis to the last
    but one.
    """
    total = made_by(input_of(softmax), "Add")
    if total is None or len(total.outputs[0].uses()) != 1:
        return False
    operands = [list(dims_of(value)) for value in total.inputs]
    if not all(operands):
        return False  # a shape is unknown
    rank = max(map(len, operands))
    if softmax.attributes.get_int("axis", -1) not in (-1, rank - 1):
        return False
    first, second = ([*[1] * (rank - len(dims)), *dims] for dims in operands)
    return any(_is_bias(bias, whole) for bias, whole in ((first, second), (second, first)))


def _is_bias(bias: list[int | str], whole: list[int | str]) -> bool:
    if bias[-1] != whole[-1]:
        return False
    leading, others = bias[:-1], whole[:-1]
    places = range(len(leading) + 1)
    outer = any(set(leading[:at]) <= {1} and leading[at:] == others[at:] for at in places)
    return outer or any(leading[:at] == others[:at] and set(leading[at:]) <= {1} for at in places)


def _at_an_end(node: ir.Node) -> bool:
    """Return whether a reduction is known to be over the first axes, the last or all."""
    axes, source = ints_of(input_of(node, 1)), input_of(node)
    if axes is None:
        return False
    if source is not None and source.shape is not None:
        axes = [axis % rank_of(source) - rank_of(source) for axis in axes]
        first = -rank_of(source)
    else:
        first = 0
    number = len(axes)
    return sorted(axes) in (list(range(-number, 0)), list(range(first, first + number)))
