"""Describe what a model exchanges with its runtime: inputs, outputs and the KV cache between steps."""

from typing import Literal

from llmc.records import Record

Padding = Literal["left", "right", "any", "none"]
StateKind = Literal["conv", "recurrent"]

#: Input of graphs whose KV cache has a fixed length, which replaces attention_mask and position_ids: (batch,)
#: int64, the slot of each row's first new token.
WRITE_INDICES = "write_indices"
#: Additional input of such graphs if they only have the logits of the last token: (batch,) int64, the number
#: of real new tokens of each row in this step; the padding after them does not count.
TOKEN_COUNTS = "token_counts"
#: Value of graphs that only have the logits of the last token: (batch, 1, 1) int64, its index in the step.
CHOSEN_TOKENS = "last/index"
#: Value of graphs that also accept a mask of the whole KV cache: (1,) int64, the slots of the cache, and so
#: the length of such a mask (`llmc.backends.onnxruntime.cuda_graph`).
CACHE_SLOTS = "step/slots"

#: Bytes that a row of an int8 KV cache has besides its numbers: its scale, a float32 (llmc/kernels/cache.h).
SCALE_BYTES = 4


def unscaled_width(dtype: str, width: int) -> int:
    """Return how many numbers a row of a KV cache with `width` elements holds."""
    return width - SCALE_BYTES if dtype == "int8" else width


class TensorSpec(Record):
    """The name, element type (`float32`, `int64`, …) and shape; a string is a named dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class CacheSlot(Record):
    """The keys and values of one decoder layer, as inputs (past) and outputs (present).

    Keys have shape (batch, kv_heads, past or total, key_width), values the same with value_width; `window`
    is the largest number of most recent positions that a query can see, None for all positions. A layer that
    caches latents (`llmc.graph.latent`) has one head, whose keys and values are the halves of a row.
    """

    layer: int
    past_key: str
    past_value: str
    present_key: str
    present_value: str
    kv_heads: int
    key_width: int
    value_width: int
    window: int | None

    @property
    def pairs(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """The names of past and present keys, then of past and present values."""
        return (self.past_key, self.present_key), (self.past_value, self.present_value)

    @property
    def pasts(self) -> tuple[str, str]:
        """The inputs: past keys and past values."""
        return self.past_key, self.past_value

    @property
    def names(self) -> tuple[str, str, str, str]:
        """The inputs and outputs: past keys and values, then present keys and values."""
        return self.past_key, self.past_value, self.present_key, self.present_value


class StateSlot(Record):
    """A state of fixed size of one decoder layer, as an input (past) and an output (present).

    Both have the shape (batch, *shape): (channels, taps - 1) for the last inputs of a convolution, (heads,
    key_width, value_width) for a recurrence; see `llmc.graph.states`. A text begins with zeros.
    """

    layer: int
    kind: StateKind
    past: str
    present: str
    shape: tuple[int, ...]


class Interface(Record):
    """The description that a runtime needs to run prefill and decode.

    Args:
        inputs: All inputs in order, including the cache.
        outputs: All outputs in order, including the cache.
        cache: One slot per attention layer, by layer.
        states: States of fixed size, by layer.
        logits: Whether `logits` has every position of the step or only the last one.
        position_ids: Whether `position_ids` is an input.
        padding: The side on which the shorter rows of a ragged batch are padded; "none" if all rows must
            have the same length.
        max_length: Largest total length for which the model has positions; None if unbounded.
        restart: Total length beyond which the runtime must recompute the KV cache from all tokens, once, as
            the original's `generate` does; None if never.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: tuple[CacheSlot, ...]
    logits: Literal["last", "all"]
    position_ids: bool
    padding: Padding
    max_length: int | None
    restart: int | None = None
    states: tuple[StateSlot, ...] = ()

    @property
    def served_tensors(self) -> dict[str, tuple[tuple[int, str, str], ...]]:
        """The tensors that go from step to step: (layer, input, output), by kind of tensor.

        The kinds are those that runtimes tell apart: key, value, conv and recurrent; those that the graph
        does not have are left out.
        """
        kinds: dict[str, list[tuple[int, str, str]]] = {}
        for slot in self.cache:
            for kind, pair in zip(("key", "value"), slot.pairs, strict=True):
                kinds.setdefault(kind, []).append((slot.layer, *pair))
        for state in self.states:
            kinds.setdefault(state.kind, []).append((state.layer, state.past, state.present))
        return {kind: tuple(tensors) for kind, tensors in kinds.items()}

    @property
    def last_layer(self) -> int:
        """The highest number of a layer with a cache or a state."""
        return max(layer for tensors in self.served_tensors.values() for layer, _, _ in tensors)

    @property
    def static_cache(self) -> bool:
        """Whether the KV cache has `max_length` slots from the start and is written in place."""
        return any(spec.name == WRITE_INDICES for spec in self.inputs)

    @property
    def vocabulary(self) -> int:
        """The size of the vocabulary, which is the last dimension of `logits`."""
        logits = next(spec for spec in self.outputs if spec.name == "logits")
        return int(logits.shape[-1])
