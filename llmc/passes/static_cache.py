"""Lower `CachedAttention` to a KV cache of fixed length: TensorScatter and Attention of ONNX opset 24.

The cache inputs and outputs are (batch, kv_heads, capacity, width), where the capacity is the graph's largest
length, so that a runtime can give both the same address. A new input replaces the mask and the positions:

    write_indices (batch,) int64      the slot of each row's first new token: the number of tokens it has

Token i of a row is in slot, and at position, write_indices + i. It sees the slots up to its own, with a
window w only the last w of them, and with chunks only those of its own chunk. Layers that share a cache slot
read what the first of them wrote. Ragged batches are therefore padded on the right: a row's padding lies
after its end, is seen by no real token and is overwritten by the next tokens.

Attention has one output and an explicit mask (batch, 1, sequence, capacity) bool. If TensorRT has no kernel
for it, attention is written in plain operators, with its softmax in float32, and the report says so for each
layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from llmc.errors import GraphError, UnsupportedError
from llmc.graph import dialect
from llmc.graph.domains import DIALECT, SINCE
from llmc.graph.edit import Site, add_constant, drop_dead, drop_unused_functions, require_opset, take_over
from llmc.graph.interface import WRITE_INDICES
from llmc.graph.match import dims_of, find_nodes
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport, Refusal

#: Largest head width for which TensorRT-RTX 1.7 has attention kernels, only in half precision.
WIDEST_HEAD = 256
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_INT64, _BOOL, _FLOAT = ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT
_MASKED = np.finfo(np.float32).min
_ROWS_OF_HEADS = {"perm": [0, 2, 1, 3]}


@dataclass(frozen=True)
class StaticCache:
    name: str = "static-cache"
    summary: str = "attention over a KV cache of fixed length as TensorScatter and Attention"

    def run(self, graph: Graph) -> PassReport:
        nodes = find_nodes(graph.graph, dialect.CACHED_ATTENTION, DIALECT)
        if graph.max_length is None:
            raise GraphError("a KV cache of fixed length needs the graph's largest length, but it has none")
        if graph.states:
            layers = sorted({state.layer for state in graph.states})
            raise UnsupportedError(
                f"layers {', '.join(map(str, layers))} keep the state of a convolution or a recurrence, for "
                "which TensorRT has no operator",
                hint="targets of ONNX Runtime have one: cpu-int4, cuda-int4 and others (llmc targets)",
            )
        if not nodes:
            return PassReport(self.name, ())
        require_opset(graph.model, SINCE["TensorScatter"])
        slots = _Slots(graph.graph, graph.max_length)
        applied: list[int | None] = []
        refusals: list[Refusal] = []
        for node in nodes:
            layer, missing = layer_of(node), _missing_kernel(node)
            _rewrite(graph.graph, node, slots, fused=missing is None)
            if missing is None:
                applied.append(layer)
            else:
                refusals.append(Refusal(*missing, str(node.name), layer))
        _replace_inputs(graph, slots)
        drop_dead(graph.graph)
        graph.padding = "right"
        drop_unused_functions(graph.model)
        return PassReport(self.name, tuple(applied), tuple(refusals))


def _missing_kernel(node: ir.Node) -> tuple[str, str] | None:
    """Return (code, reason) if TensorRT has no kernel for `node`, which then becomes plain operators."""
    query, key, value = node.inputs[:3]
    if query is None or key is None or value is None:
        raise GraphError(f"attention {node.name} has no query, key or value")
    key_width, value_width = dims_of(key)[-1], dims_of(value)[-1]
    if query.dtype not in _HALVES:
        return "float32-attention", f"attention in {query.dtype} has no kernel, unlike float16 and bfloat16"
    if not isinstance(key_width, int) or key_width > WIDEST_HEAD:
        return "head-width", f"heads are {key_width} wide; kernels go up to {WIDEST_HEAD}"
    if key_width != value_width:
        return "value-width", f"keys are {key_width} wide and values {value_width}; kernels support one width"
    if node.attributes["softcap"].as_float():
        return "softcap", f"scores are capped at {node.attributes['softcap'].as_float():g}; no kernel caps"
    if len(node.inputs) > 6:
        return "sinks", "softmax has attention sinks, which no kernel supports"
    return None


@dataclass
class _Slots:
    """The positions and masks, each computed once per graph before its first node.

    Args:
        graph: The graph to change.
        capacity: Number of slots of the KV cache.
    """

    graph: ir.Graph
    capacity: int
    _masks: dict[tuple[int, int], ir.Value] = field(default_factory=dict)
    _written: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _last: ir.Value | None = None

    def __post_init__(self) -> None:
        self.write_indices = ir.val(WRITE_INDICES, _INT64, ["batch"])
        self._site = Site(self.graph, next(iter(self.graph)))
        self.positions = self._positions()

    def mask(self, window: int, chunk: int) -> ir.Value:
        """Return which slots each query sees, (batch, 1, sequence, capacity) bool; 0 is unlimited."""
        if (window, chunk) not in self._masks:
            self._masks[window, chunk] = self._mask(window, chunk)
        return self._masks[window, chunk]

    def write(self, site: Site, past: ir.Value, update: ir.Value, present: ir.Value) -> ir.Value:
        """Emit the cache after this step, once for all layers that share `past`."""
        if past not in self._written:
            _fix_length(past, self.capacity)
            _fix_length(present, self.capacity)
            scatter = site.emit(
                "TensorScatter",
                [past, update, self.write_indices],
                f"{present.name}/updated",
                attributes={"axis": 2, "mode": "linear"},
                like=present,
            )
            take_over(present, scatter.outputs[0])
            self._written[past] = scatter.outputs[0]
        return self._written[past]

    def _positions(self) -> ir.Value:
        """Emit the slot of each new token, (batch, sequence) int64."""
        graph = self.graph
        ids = next(v for v in graph.inputs if v.name == "input_ids")
        length = self._emit("Shape", [ids], "slots/length", [1], attributes={"start": 1, "end": 2})
        scalar = self._emit("Squeeze", [length], "slots/count", [])
        zero, one = (add_constant(graph, np.array(n, np.int64), "number") for n in (0, 1))
        steps = self._emit("Range", [zero, scalar, one], "slots/steps", ["sequence"])
        rows, columns = (add_constant(graph, np.array([n], np.int64), "axis") for n in (0, 1))
        first = self._emit("Unsqueeze", [self.write_indices, columns], "slots/first", ["batch", 1])
        steps = self._emit("Unsqueeze", [steps, rows], "slots/row", [1, "sequence"])
        return self._emit("Add", [first, steps], "slots/positions", ["batch", "sequence"])

    def _mask(self, window: int, chunk: int) -> ir.Value:
        if self._last is None:
            heads = add_constant(self.graph, np.array([1, 3], np.int64), "axis")
            dims: list[int | str] = ["batch", 1, "sequence", 1]
            self._last = self._emit("Unsqueeze", [self.positions, heads], "slots/last", dims)
        slots = add_constant(self.graph, np.arange(self.capacity, dtype=np.int64), "slots")
        dims = ["batch", 1, "sequence", self.capacity]
        unique = f"_{window}" * bool(window) + f"_chunk_{chunk}" * bool(chunk)
        mask = self._emit("LessOrEqual", [slots, self._last], f"slots/causal{unique}", dims, _BOOL)
        thin = [*dims[:3], 1]
        if window:
            width = add_constant(self.graph, np.array(window, np.int64), "window")
            before = self._emit("Sub", [self._last, width], f"slots/before{unique}", thin)
            inside = self._emit("Greater", [slots, before], f"slots/inside{unique}", dims, _BOOL)
            mask = self._emit("And", [mask, inside], f"slots/mask{unique}", dims, _BOOL)
        if chunk:
            size = add_constant(self.graph, np.array(chunk, np.int64), "chunk")
            full = self._emit("Div", [self._last, size], f"slots/full{unique}", thin)
            first = self._emit("Mul", [full, size], f"slots/first{unique}", thin)
            inside = self._emit("GreaterOrEqual", [slots, first], f"slots/own{unique}", dims, _BOOL)
            mask = self._emit("And", [mask, inside], f"slots/mask_of{unique}", dims, _BOOL)
        return mask

    def _emit(
        self,
        op: str,
        inputs: list[ir.Value],
        name: str,
        shape: list[int | str],
        dtype: ir.DataType = _INT64,
        *,
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        node = self._site.emit(op, inputs, name, attributes=attributes, shape=shape, dtype=dtype)
        node.metadata_props.clear()
        return node.outputs[0]


def _rewrite(graph: ir.Graph, node: ir.Node, slots: _Slots, *, fused: bool) -> None:
    query, key, value = node.inputs[:3]
    site, stem = Site(graph, node), str(node.name)
    caches = []
    for update, past, present in zip((key, value), node.inputs[3:5], node.outputs[1:], strict=True):
        if update is None or past is None:
            raise GraphError(f"attention {node.name} has no past")
        caches.append(slots.write(site, past, update, present))
    if query is None:
        raise GraphError(f"attention {node.name} has no query")
    mask = slots.mask(node.attributes.get_int("window", 0), node.attributes.get_int("chunk", 0))
    output = node.outputs[0]
    batch, sequence, heads, width = dims_of(output)
    if fused:
        attended = site.emit(
            "Attention",
            [query, *caches, mask],
            f"{stem}/attended",
            attributes={"scale": node.attributes["scale"].as_float()},
            shape=[batch, heads, sequence, width],
            dtype=output.dtype,
        ).outputs[0]
    else:
        attended = _PlainAttention(site, stem, node, slots.capacity).attend(query, caches, mask)
    turned = site.emit("Transpose", [attended], f"{stem}/rows", attributes=_ROWS_OF_HEADS, like=output)
    take_over(output, turned.outputs[0])


@dataclass(frozen=True)
class _PlainAttention:
    """The attention in plain operators; keys and values are repeated for the heads that share them."""

    site: Site
    stem: str
    node: ir.Node
    capacity: int

    def attend(self, query: ir.Value, caches: list[ir.Value], mask: ir.Value) -> ir.Value:
        """Emit attended values (batch, heads, sequence, value_width)."""
        dims, dtype = dims_of(query), query.dtype
        if dtype is None:
            raise GraphError(f"{query.name} has no element type")
        heads, width = dims[1], dims_of(caches[1])[-1]
        keys, values = (self._repeat(cache, heads) for cache in caches)
        turned = [*dims_of(keys)[:2], dims_of(keys)[3], self.capacity]
        keys = self._emit("Transpose", [keys], "keys", turned, dtype, {"perm": [0, 1, 3, 2]})
        scale = np.array(self.node.attributes["scale"].as_float(), dtype.numpy())
        scaled = self._emit("Mul", [query, self._constant(scale)], "scaled", dims, dtype)
        shape = [*dims[:3], self.capacity]
        scores = self._emit("MatMul", [scaled, keys], "scores", shape, dtype)
        if dtype != _FLOAT:
            scores = self._emit("Cast", [scores], "float_scores", shape, _FLOAT, {"to": int(_FLOAT)})
        scores = self._cap(scores, shape)
        masked = self._constant(np.array(_MASKED))
        scores = self._emit("Where", [mask, scores, masked], "visible", shape, _FLOAT)
        weights = self._softmax(scores, shape)
        if dtype != _FLOAT:
            weights = self._emit("Cast", [weights], "weights", shape, dtype, {"to": int(dtype)})
        return self._emit("MatMul", [weights, values], "attended", [*dims[:3], width], dtype)

    def _repeat(self, cache: ir.Value, heads: int | str) -> ir.Value:
        """Repeat every head of (batch, kv_heads, capacity, width) for the queries that share it."""
        batch, kv_heads, capacity, width = dims_of(cache)
        if kv_heads == heads:
            return cache
        if not isinstance(heads, int) or not isinstance(kv_heads, int):
            raise GraphError(f"attention {self.node.name} has no known number of heads")
        group = heads // kv_heads
        axis = self._constant(np.array([2], np.int64))
        name = f"{cache.name}/heads"
        wide = self._emit(
            "Unsqueeze", [cache, axis], name, [batch, kv_heads, 1, capacity, width], cache.dtype
        )
        times = self._constant(np.array([1, 1, group, 1, 1], np.int64))
        dims = [batch, kv_heads, group, capacity, width]
        wide = self._emit("Expand", [wide, times], f"{name}_repeated", dims, cache.dtype)
        target = self._constant(np.array([0, heads, capacity, width], np.int64))
        flat = [batch, heads, capacity, width]
        return self._emit("Reshape", [wide, target], f"{name}_flat", flat, cache.dtype)

    def _cap(self, scores: ir.Value, shape: list[int | str]) -> ir.Value:
        softcap = self.node.attributes["softcap"].as_float()
        if not softcap:
            return scores
        cap = self._constant(np.array(softcap, np.float32))
        scores = self._emit("Div", [scores, cap], "over_cap", shape, _FLOAT)
        scores = self._emit("Tanh", [scores], "tanh", shape, _FLOAT)
        return self._emit("Mul", [scores, cap], "capped", shape, _FLOAT)

    def _softmax(self, scores: ir.Value, shape: list[int | str]) -> ir.Value:
        last = {"axis": -1}
        if len(self.node.inputs) <= 6:
            return self._emit("Softmax", [scores], "softmax", shape, _FLOAT, last)
        sinks = self.node.inputs[6]
        if sinks is None:
            raise GraphError(f"attention {self.node.name} has no sinks")
        column = self._constant(np.array([1, shape[1], 1, 1], np.int64))
        sink = self._emit("Reshape", [sinks, column], "sinks", [1, shape[1], 1, 1], sinks.dtype)
        if sinks.dtype != _FLOAT:
            sink = self._emit("Cast", [sink], "float_sinks", [1, shape[1], 1, 1], _FLOAT, {"to": int(_FLOAT)})
        # max over scores and sink, then exp and sum: a softmax with one more column, which is dropped.
        axis = self._constant(np.array([-1], np.int64))
        thin = [*shape[:3], 1]
        peak = self._emit("ReduceMax", [scores, axis], "peak", thin, _FLOAT, {"keepdims": 1})
        peak = self._emit("Max", [peak, sink], "peak_with_sink", thin, _FLOAT)
        exponentials = self._emit(
            "Exp", [self._emit("Sub", [scores, peak], "below", shape, _FLOAT)], "exp", shape, _FLOAT
        )
        total = self._emit("ReduceSum", [exponentials, axis], "sum", thin, _FLOAT, {"keepdims": 1})
        sunk = self._emit(
            "Exp", [self._emit("Sub", [sink, peak], "sink_below", thin, _FLOAT)], "sunk", thin, _FLOAT
        )
        total = self._emit("Add", [total, sunk], "sum_with_sink", thin, _FLOAT)
        return self._emit("Div", [exponentials, total], "softmax", shape, _FLOAT)

    def _constant(self, array: np.ndarray) -> ir.Value:
        return add_constant(self.site.graph, array, "attention")

    def _emit(
        self,
        op: str,
        inputs: list[ir.Value],
        name: str,
        shape: list[int | str],
        dtype: ir.DataType | None,
        attributes: Mapping[str, int | list[int]] | None = None,
    ) -> ir.Value:
        name = f"{self.stem}/{name}"
        return self.site.emit(op, inputs, name, attributes=attributes, shape=shape, dtype=dtype).outputs[0]


def _fix_length(value: ir.Value, capacity: int) -> None:
    batch, heads, _, width = dims_of(value)
    value.shape = ir.Shape([batch, heads, capacity, width])


def _replace_inputs(graph: Graph, slots: _Slots) -> None:
    """Replace the inputs attention_mask and position_ids by write_indices."""
    inputs = {str(v.name): v for v in graph.graph.inputs}
    positions = inputs.get("position_ids")
    if positions is not None:
        ir.convenience.replace_all_uses_with(positions, slots.positions)
        graph.graph.inputs.remove(positions)
    mask = inputs["attention_mask"]
    drop_dead(graph.graph)
    for use in list(mask.uses()):
        if _is_batch_size(use.node):
            use.node.replace_input_with(use.idx, slots.write_indices)
    if mask.uses():
        user = next(iter(mask.uses())).node
        raise UnsupportedError(
            f"{user.name} ({user.op_type}) reads attention_mask outside of attention; a KV cache of fixed "
            "length has no such input"
        )
    graph.graph.inputs.insert(list(graph.graph.inputs).index(mask), slots.write_indices)
    graph.graph.inputs.remove(mask)


def _is_batch_size(node: ir.Node) -> bool:
    """Return whether `node` reads the number of rows from its input; other inputs have the same number."""
    span = node.attributes.get_int("start", 0), node.attributes.get_int("end", 0)
    return node.op_type == "Shape" and span == (0, 1)


PASS = StaticCache()
