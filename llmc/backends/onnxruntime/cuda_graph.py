"""Let a decode step be one CUDA graph: one launch of all kernels, recorded at the first token of a text.

What onnxruntime-genai 0.18 does with `enable_cuda_graph` (its src/models and src/cuda):

- Every run, prompts included, is fed an `attention_mask` with as many slots as the KV cache, zeros beyond
  the text. The cache must share past and present, which a search with several beams cannot.
- Steps of one token are captured, anew for each generator, so that any number of rows can be served; prompts
  run kernel by kernel. States of fixed size swap their buffers, and a graph is captured for each order.

ONNX Runtime 1.31 captures a graph without control flow, and without copies between host and device. Values
on the host keep what the captured step computed, so that they may depend on shapes alone; addresses that a
kernel's host code copies to the device would have to stay in memory for every launch, which is not relied on.

A mask of the whole cache does not say where the step ends. `follow_static_mask` therefore reads the step's
own tokens at the end of a mask that grows with the text, and at the beginning of one that has as many slots
as the cache. There, a row that runs one token has a 1; a row that runs alone has only ones; and several rows
of several tokens are the beginning of their texts, since attention takes such a step on an empty cache only.
It takes a cache for empty if the total length equals the step's, and is therefore given the step's length.
"""

from collections.abc import Iterator
from itertools import chain

import numpy as np
import onnx_ir as ir

from llmc.backends.onnxruntime.genai import shares_cache
from llmc.graph.domains import MICROSOFT
from llmc.graph.edit import Site, add_constant, drop_dead
from llmc.graph.interface import CACHE_SLOTS, Interface
from llmc.graph.match import constant_of, dims_of, input_of, is_op, made_by
from llmc.graph.model import Graph

#: The value that `follow_static_mask` emits for the first slot of the step in the mask.
_START = "step/start"
_TOTAL_AT = 6
_INT64, _BOOL = ir.DataType.INT64, ir.DataType.BOOL
#: Inputs that ONNX Runtime's CUDA kernels read on the host.
_ON_HOST = {
    "ConstantOfShape": (0,), "CumSum": (1,), "Expand": (1,), "GroupQueryAttention": (_TOTAL_AT,),
    "OneHot": (1,), "Pad": (1, 2, 3), "Range": (0, 1, 2), "ReduceMean": (1,), "ReduceSum": (1,),
    "Reshape": (1,), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Tile": (1,), "TopK": (1,),
    "Unsqueeze": (1,),
}  # fmt: skip
#: Most parts that CUDA's kernels of Concat and Split take without a list of addresses.
_PARTS = 32
#: Operators whose results have as many elements as their values say.
_COUNTED = frozenset({"Compress", "NonZero", "Unique"})
#: Operators between a shape and what reads it.
_ARITHMETIC = frozenset({
    "Add", "And", "Cast", "Concat", "Div", "Equal", "Gather", "Greater", "Max", "Min", "Mul", "Neg",
    "Squeeze", "Sub", "Unsqueeze", "Where",
})  # fmt: skip


def graph_obstacle(model: ir.Model, interface: Interface) -> str | None:
    """Explain why a decode step cannot be one CUDA graph; None if it can.

    Args:
        model: The graph in its final form.
    """
    return next(_obstacles(model, interface, followed=True), None)


def follow_static_mask(graph: Graph) -> str | None:
    """Let a graph be fed a mask of the whole KV cache, too, unless its step cannot be a CUDA graph anyway.

    Returns:
        The obstacle.
    """
    interface = graph.interface()
    obstacle = next(_obstacles(graph.model, interface, followed=False), None)
    if obstacle is None:
        _rewrite(graph.graph, interface)
        drop_dead(graph.graph)
    return obstacle


def _obstacles(model: ir.Model, interface: Interface, *, followed: bool) -> Iterator[str]:
    """Yield the obstacles to a CUDA graph.

    Args:
        followed: Whether `follow_static_mask` has run, so that nothing reads the end of the mask any more.
    """
    nodes = list(model.graph)
    for node in chain(nodes, *model.functions.values()):
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            yield f"{node.op_type} is control flow"
    if not interface.cache:
        yield "there is no KV cache, by whose length a mask of the whole context is known"
    elif not shares_cache(model, interface):
        yield "past and present of the KV cache cannot share a buffer: attention is in plain operators"
    mask = next(v for v in model.graph.inputs if v.name == "attention_mask")
    yield from _mask_obstacles(mask, followed)
    for node in nodes:
        if _copies_addresses(node):
            yield f"{node.op_type} copies addresses to the device"
        if node.op_type in _COUNTED:
            yield f"the size of what {node.op_type} returns depends on values"
        for at in _ON_HOST.get(node.op_type, ()):
            if not _from_shapes(input_of(node, at)):
                yield f"{node.op_type} takes a size that is computed from values"


def _mask_obstacles(mask: ir.Value, followed: bool) -> Iterator[str]:
    """Yield what reads a mask of the whole KV cache differently from one that ends with the step."""
    for node, at in mask.uses():
        if node.op_type == "Shape":
            if node.attributes.get_int("start", 0) > 0:
                yield from (
                    f"{op} reads the length of attention_mask" for op in _length_readers(node.outputs[0])
                )
        elif _reads_step(node, at):
            if followed and getattr(input_of(node, 1), "name", None) != _START:
                yield "Slice reads the end of attention_mask"
        elif node.op_type != "ReduceSum":
            yield f"{node.op_type} reads attention_mask slot by slot"


def _reads_step(node: ir.Node, at: int) -> bool:
    """Return whether `node` reads the slots of the step's own tokens from the mask, its input `at`."""
    axes = constant_of(input_of(node, 3))
    return is_op(node, "Slice") and at == 0 and axes is not None and axes.numpy().tolist() == [1]


def _length_readers(length: ir.Value) -> Iterator[str]:
    """Yield the operators beyond attention and slices of the mask that a length of the mask reaches."""
    for node, at in length.uses():
        if node.op_type in _ARITHMETIC:
            for output in node.outputs:
                yield from _length_readers(output)
        elif (node.op_type, at) not in (("GroupQueryAttention", _TOTAL_AT), ("Slice", 1), ("Slice", 2)):
            yield node.op_type


def _copies_addresses(node: ir.Node) -> bool:
    """Return whether CUDA's kernel takes lists of addresses, which the host copies in every step.

    A product does unless its second factor is a matrix, or both have the same batch; Concat and Split do for
    more parts than a kernel's arguments hold.
    """
    if node.op_type in ("MatMul", "FusedMatMul"):
        first, second = (dims_of(value) for value in node.inputs)
        return len(second) != 2 and first[:-2] != second[:-2]
    return (node.op_type == "Concat" and len(node.inputs) > _PARTS) or (
        node.op_type == "Split" and len(node.outputs) > _PARTS
    )


def _from_shapes(value: ir.Value | None) -> bool:
    """Return whether `value` is computed from constants and shapes alone."""
    if value is None or value.const_value is not None:
        return True
    node = value.producer()
    if node is None:
        return False
    return node.op_type in ("Shape", "Size", "Constant") or all(_from_shapes(v) for v in node.inputs)


def _rewrite(graph: ir.Graph, interface: Interface) -> None:
    inputs = {str(v.name): v for v in graph.inputs}
    ids, mask, past = (inputs[n] for n in ("input_ids", "attention_mask", interface.cache[0].past_key))
    site = Site(graph, graph[0], metadata={})

    def emit(
        op: str, operands: list[ir.Value], name: str, dtype: ir.DataType = _INT64, **attributes: int
    ) -> ir.Value:
        return site.emit(op, operands, name, attributes=attributes, shape=[1], dtype=dtype).outputs[0]

    def size(value: ir.Value, axis: int, name: str) -> ir.Value:
        return emit("Shape", [value], name, start=axis, end=axis + 1)

    zero, one = (add_constant(graph, np.array([n], np.int64), "axis") for n in (0, 1))
    total, length = size(mask, 1, "step/total"), size(ids, 1, "step/length")
    static = emit("Equal", [total, size(past, 2, CACHE_SLOTS)], "step/static", _BOOL)
    grown = emit("Sub", [total, length], "step/grown")
    start = emit("Where", [static, zero, grown], _START)
    end = emit("Add", [start, length], "step/end")
    for node, at in list(mask.uses()):
        if _reads_step(node, at):
            node.replace_input_with(1, start)
            node.replace_input_with(2, end)
    rows = emit("Sub", [size(ids, 0, "step/rows"), one], "step/other_rows")
    others = emit("Mul", [rows, emit("Sub", [length, one], "step/others")], "step/product")
    several = emit("Greater", [others, zero], "step/several", _BOOL)
    begins = emit("And", [static, several], "step/begins", _BOOL)
    attended = emit("Where", [begins, length, total], "step/attended")
    for scalar in {_total_of(n) for n in graph if is_op(n, "GroupQueryAttention", MICROSOFT)} - {None}:
        scalar.replace_input_with(0, attended)  # type: ignore[union-attr]


def _total_of(attention: ir.Node) -> ir.Node | None:
    """Return the Squeeze of the mask's length by which attention knows the total length."""
    cast = made_by(input_of(attention, _TOTAL_AT), "Cast")
    return None if cast is None else made_by(input_of(cast), "Squeeze")
