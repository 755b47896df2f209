"""Take attention over a KV cache into a region."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from llmc.backends.compiled.operands import reads_shared_cache, shift_of
from llmc.backends.compiled.program import Caches, Fields, Operation, RowPlace, Variant
from llmc.config import CacheType
from llmc.graph.match import dims_of, input_of, operand
from llmc.graph.model import CHUNK

if TYPE_CHECKING:
    from llmc.backends.compiled.region import RegionBuilder

#: C++ types of llmc/kernels/cache.h for the rows of the KV cache.
ROWS = {CacheType.FLOAT32: "FloatRows", CacheType.FLOAT16: "HalfRows", CacheType.INT8: "ByteRows"}


def grouped_query(builder: RegionBuilder, node: ir.Node) -> None:
    """Add a GroupQueryAttention."""
    heads, kv_heads = (node.attributes[n].as_int() for n in ("num_heads", "kv_num_heads"))
    width = int(dims_of(operand(node, 3))[-1])
    shared = reads_shared_cache(node)
    operands = (builder.place(operand(node, 0)),) if shared else _projections(builder, node, width)
    rotated, interleaved = 0, False
    fields: Fields = {}
    if node.attributes.get_int("do_rotary", 0):
        cos, sin = operand(node, 7), operand(node, 8)
        positions, half = (int(d) for d in dims_of(cos))
        rotated, interleaved = 2 * half, bool(node.attributes.get_int("rotary_interleaved", 0))
        fields |= {"cos": builder.weight(cos), "sin": builder.weight(sin), "limit": positions}
        shift = shift_of(node)
        if shift is not None:
            fields["shift"] = builder.input(shift)
    geometry = f"{heads}, {kv_heads}, {width}, {rotated}, {str(interleaved).lower()}"
    caches = _shared_caches(builder, node) if shared else _own_caches(builder, node)
    builder.total = operand(node, 6)
    builder.input(builder.total)
    scale = node.attributes.get_float("scale", 0.0)
    softcap = node.attributes.get_float("softcap", 0.0)
    chunk = int(node.metadata_props.get(CHUNK, 0))
    sinks = input_of(node, 11)
    if sinks is not None:
        fields["sinks"] = builder.weight(sinks)
    common: Fields = {
        **fields,
        "cache": caches,
        "lengths": builder.input(operand(node, 5)),
        "window": -chunk or max(0, node.attributes.get_int("local_window_size", -1)),
        "x": scale or width**-0.5,
        "y": softcap,
    }
    turned = builder.temporary(heads * width, "kTokens")
    output = builder.make(node.outputs[0], heads * width, "kTokens")
    served, exact = (
        _attention(f"Attention<{geometry}, {kind}>", common, operands, turned, output)
        for kind in (f"{ROWS[builder.cache]}, Tile", f"{ROWS[CacheType.FLOAT32]}, ExactTile")
    )
    for operation, replacement in zip(served, exact, strict=True):
        instead: dict[Variant, tuple[Operation]] = {"exact": (replacement,)}
        builder.program.operations.append(replace(operation, instead=instead))


def _projections(builder: RegionBuilder, node: ir.Node, width: int) -> tuple[RowPlace, ...]:
    """Return the rows of query, key and value, which may be packed into one."""
    query = builder.place(operand(node, 0))
    if node.inputs[1] is not None:
        return query, *(builder.place(operand(node, i)) for i in (1, 2))
    heads, kv_heads = (node.attributes[n].as_int() * width for n in ("num_heads", "kv_num_heads"))
    parts = ((0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads))
    return tuple(query.part(offset, size) for offset, size in parts)


def _own_caches(builder: RegionBuilder, node: ir.Node) -> Caches:
    """Return the pasts and the presents of a layer that extends its cache."""
    caches = [builder.input(operand(node, i)) for i in (3, 4)]
    for past, present in zip(node.inputs[3:5], node.outputs[1:3], strict=True):
        if past is not None:
            builder.pasts[present] = past
        caches.append(builder.outputs[present])
    return Caches(tuple(caches))


def _shared_caches(builder: RegionBuilder, node: ir.Node) -> Caches:
    """Return the presents of another layer, of this region or an earlier one, as pasts and presents."""
    presents = [operand(node, i) for i in (3, 4)]
    return Caches(
        tuple(builder.outputs[v] if v in builder.outputs else builder.input(v) for v in presents * 2)
    )


def _attention(
    kind: str,
    common: Fields,
    operands: tuple[RowPlace, ...],
    turned: RowPlace,
    output: RowPlace,
) -> tuple[Operation, ...]:
    """Create attention of the C++ type `kind`: reads `operands`, writes `output`.

    Args:
        operands: Query, key and value; the query alone if another layer has extended the cache.
    """
    query, *appended = operands
    carry: Fields = {"chunks": f"{kind}::carry_chunks", "chunk": f"{kind}::carry", "check": f"{kind}::check"}
    work: Fields = {"chunks": f"{kind}::chunks", "chunk": f"{kind}::chunk", "a": turned, "out": output}
    combine: Fields = {"row": f"{kind}::combine", "out": output}
    scratch, shared = f"{kind}::scratch", f"{kind}::shared(run)"
    attend = (
        Operation("chunk", "kTokens", {**common, **work}, scratch, shared),
        Operation("row", "kTokens", {**common, **combine}),
    )
    if not appended:
        turn: Fields = {"row": f"{kind}::turn", "check": f"{kind}::check", "a": query, "out": turned}
        return Operation("row", "kTokens", {**common, **turn}), *attend
    key, value = appended
    append: Fields = {"row": f"{kind}::append", "a": query, "b": key, "c": value, "out": turned}
    return (
        Operation("chunk", "kTokens", {**common, **carry}),
        Operation("row", "kTokens", {**common, **append}),
        *attend,
    )
