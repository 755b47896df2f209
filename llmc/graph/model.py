"""Define `Graph`: an ONNX model in memory together with its KV-cache signature."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Literal

import onnx_ir as ir

from llmc.errors import CheckpointError, GraphError
from llmc.graph.interface import CacheSlot, Interface, Padding, StateSlot, TensorSpec
from llmc.graph.match import dims_of
from llmc.graph.weights import CastRows, LazyWeight, StoredRows, WeightGroup, WeightStore

#: Node metadata: index of the decoder layer to which a node belongs.
LAYER = "llmc.layer"
#: Node metadata of torch's exporter: names of the modules around a node, as a Python list.
SCOPES = "pkg.torch.onnx.name_scopes"
#: Node metadata: layouts of the packed weights that a compiled operator reads, as JSON by initializer name:
#: [outputs, inputs, bits, block size, PackedZero].
PACKED = "llmc.packed"

#: Node metadata: bits that the codes of an operator with float zero points need, if its codes are wider.
CODE_BITS = "llmc.code_bits"

#: Node metadata: positions of the chunks that the bias of a GroupQueryAttention hides from each other.
CHUNK = "llmc.chunk"


class PackedZero(IntEnum):
    """The representation of zero in the blocks of a packed matrix.

    MIDDLE: the middle code. CODE: a 4-bit zero point per block, value = (code - zero) * scale. MINIMUM: a
    float16 minimum per block, value = code * scale + minimum.
    """

    MIDDLE = 0
    CODE = 1
    MINIMUM = 2


@dataclass
class Graph:
    """A decoder: prefill and decode in one ONNX graph.

    Args:
        model: The ONNX model. Weights are initializers; before `bind` they have no data.
        cache: One slot per attention layer that owns keys and values, by layer.
        states: States of fixed size, by layer.
        layers: Number of decoder layers.
        logits: Whether `logits` has every position or only the last one.
        padding: Side on which a ragged batch may be padded; "none" if all rows must have the same length.
        max_length: Largest total length for which the model has positions; None if unbounded.
        restart: Total length beyond which the runtime that serves the graph must recompute the KV cache, as
            the original's `generate` does; None if never.
        aliases: For a weight that several parameters share, all their names, by initializer name.
        notes: Remarks of tracing and passes for the user.
    """

    model: ir.Model
    cache: tuple[CacheSlot, ...]
    layers: int
    states: tuple[StateSlot, ...] = ()
    logits: Literal["last", "all"] = "all"
    padding: Padding = "any"
    max_length: int | None = None
    restart: int | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    def interface(self) -> Interface:
        """Describe what a runtime needs to know of this graph."""
        inputs = tuple(_spec(v) for v in self.graph.inputs)
        return Interface(
            inputs=inputs,
            outputs=tuple(_spec(v) for v in self.graph.outputs),
            cache=self.cache,
            states=self.states,
            logits=self.logits,
            position_ids=any(spec.name == "position_ids" for spec in inputs),
            padding=self.padding,
            max_length=self.max_length,
            restart=self.restart,
        )

    def unbound(self) -> Iterator[ir.Value]:
        """Yield the weights that have a name, a shape and a type, but no data yet."""
        for value in self.graph.initializers.values():
            if isinstance(value.const_value, Placeholder):
                yield value

    def bind(self, store: WeightStore, tied: Mapping[str, str]) -> tuple[str, ...]:
        """Give every weight its source in `store`, cast to the graph's type if it differs.

        Args:
            store: The checkpoint's tensors.
            tied: Parameter names absent from the store -> the stored name to use for each.

        Returns:
            The stored tensors that nothing in the graph reads.

        Raises:
            CheckpointError: A weight has no source, or a source of another shape.
        """
        infos = store.infos()
        used: set[str] = set()
        for value in list(self.unbound()):
            name = _name(value)
            candidates = [name, *self.aliases.get(name, ())]
            candidates += [tied[c] for c in candidates if c in tied]
            stored = next((c for c in candidates if c in infos), None)
            if stored is None:
                raise CheckpointError(
                    f"the model needs tensor {name}, which the checkpoint does not have",
                    hint="the checkpoint is incomplete, or belongs to another version of the architecture",
                )
            info = infos[stored]
            shape = tuple(_shape(value).numpy())
            if info.shape != shape:
                raise CheckpointError(
                    f"tensor {stored} has shape {info.shape}; the model needs {shape}",
                    hint="config.json and the weights belong to different models",
                )
            rows: StoredRows | CastRows = StoredRows(store, info)
            dtype = _dtype(value)
            if info.dtype != dtype:
                rows = CastRows(rows, dtype)
            value.const_value = LazyWeight.from_rows(name, rows)
            used.update(c for c in candidates if c in infos)
        return tuple(sorted(set(infos) - used))

    def with_logits(self, logits: Literal["last", "all"]) -> "Graph":
        return replace(self, logits=logits)


class Placeholder(LazyWeight):
    """A weight whose data is not yet known; reading it is an error."""

    def __init__(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
        def refuse() -> Mapping[str, object]:
            raise GraphError(f"weight {name} is read before a checkpoint was bound to the graph")

        group = WeightGroup((name,), refuse)  # type: ignore[arg-type]
        super().__init__(name=name, dtype=dtype, shape=shape, group=group, key="value")


def layer_of(node: ir.Node) -> int | None:
    """Return the decoder layer to which `node` belongs; None outside the layers."""
    text = node.metadata_props.get(LAYER)
    return None if text is None else int(text)


def _name(value: ir.Value) -> str:
    if not value.name:
        raise GraphError(f"a value of the graph has no name: {value!r}")
    return value.name


def _shape(value: ir.Value) -> ir.Shape:
    if value.shape is None:
        raise GraphError(f"value {value.name} has no shape")
    return value.shape


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise GraphError(f"value {value.name} has no element type")
    return value.dtype


def _spec(value: ir.Value) -> TensorSpec:
    _shape(value)
    return TensorSpec(name=_name(value), dtype=_dtype(value).numpy().name, shape=tuple(dims_of(value)))
