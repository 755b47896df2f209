"""Tell which operators of a graph ONNX Runtime's CUDA provider leaves to cuDNN.

It loads cuDNN when the first of them runs, and fails there without it; nothing else needs cuDNN. The table
was found by running each operator of 1.31.1 on its own; `tests/test_cuda_kernels.py` holds it.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from llmc.graph.domains import STANDARD
from llmc.graph.match import input_of, ints_of, rank_of

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
    return node.op_type in _ALWAYS or (node.op_type in _INNER and not _at_an_end(node))


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
