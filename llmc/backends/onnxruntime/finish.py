"""Apply the last changes to a quantized graph before ONNX Runtime's model.onnx is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from llmc.backends.onnxruntime.cuda_graph import follow_static_mask
from llmc.backends.onnxruntime.host_shapes import copy_host_sizes
from llmc.backends.onnxruntime.minimums import split_minimums
from llmc.backends.onnxruntime.one_copy import read_as_stored
from llmc.backends.onnxruntime.reductions import reduce_without_cudnn
from llmc.backends.onnxruntime.rotary_tables import compute_tables, find_pairs
from llmc.graph.model import Graph

Result = TypeVar("Result")


def finish_graph(graph: Graph, kernels: Callable[[Graph], Result]) -> Result:
    """Convert a quantized graph to its final form.

    Args:
        kernels: Function that replaces regions of the graph by compiled operators, if the target has them.

    Returns:
        The result of `kernels`.
    """
    tables = find_pairs(graph)
    result = kernels(graph)
    split_minimums(graph)
    compute_tables(graph, tables)
    return result


def finish_for_cuda(graph: Graph) -> str | None:
    """Convert a quantized graph to its final form for the CUDA provider.

    Returns:
        Why a decode step cannot be one CUDA graph; None if it can.
    """
    finish_graph(graph, lambda _: None)
    read_as_stored(graph)
    reduce_without_cudnn(graph)
    obstacle = follow_static_mask(graph)
    copy_host_sizes(graph)
    return obstacle
