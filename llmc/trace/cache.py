"""Provide a transformers `Cache` for tracing that passes keys and values on and records them.

If attention is captured, each step's keys and values pass through unchanged, since the captured operator
extends the cache. If a model computes attention itself, the node `ExtendCache` represents the past and new
keys and values together, until `llmc.trace.expand` replaces it by the graph's own inputs. States of
convolutions and recurrences are recorded only: their nodes (`llmc.trace.kernels`) get past and present later.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from llmc.errors import UnsupportedError
from llmc.graph.domains import TRACE
from llmc.trace.capture import STATES_HINT, Capture, StateKey, StoredKeys, UnknownStateError

if TYPE_CHECKING:
    import torch

EXTEND = "ExtendCache"
INDEX = "ExtendIndex"


class _Layers:
    """The layers of a cache, for a model that reads them itself, or appends one for each run of a layer."""

    def __init__(self, owner: _Recording, count: int) -> None:
        self._owner = owner
        self._layers = [_StoredLayer(owner, index) for index in range(count)]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index]

    def __iadd__(self, more: Iterable[Any]) -> Self:
        count = len(self)
        self._layers += [_StoredLayer(self._owner, count + n) for n, _ in enumerate(more)]
        return self


class _StoredLayer:
    """What a model may read of one layer: its length, and its keys and values once they are stored."""

    is_initialized = True
    is_sliding = False

    def __init__(self, owner: _Recording, index: int) -> None:
        self._owner = owner
        self._index = index

    @property
    def keys(self) -> torch.Tensor | _Unstored:
        return self._stored[0]

    @property
    def values(self) -> torch.Tensor | _Unstored:
        return self._stored[1]

    @property
    def _stored(self) -> tuple[torch.Tensor | _Unstored, torch.Tensor | _Unstored]:
        unstored = _Unstored(self._index)
        return self._owner.wholes.get(self._index, (unstored, unstored))

    def get_seq_length(self) -> Any:
        return self._owner.get_seq_length(self._index)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._owner.get_mask_sizes(query_length, self._index)

    def get_max_length(self) -> int:
        return self._owner.get_max_length(self._index)

    def __deepcopy__(self, _: Any) -> Self:
        return self

    def __getattr__(self, name: str) -> Any:
        raise _unread(name, self._index)


class _Unstored:
    """Keys or values of a layer that has yet to store those of this step: some of earlier tokens exist."""

    def __init__(self, index: int) -> None:
        self._index = index

    def numel(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        raise _unread("keys and values", self._index)

    @classmethod
    def __torch_function__(cls, _: Any, __: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils import _pytree as pytree

        found = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        raise _unread("keys and values", found._index)


def _unread(what: str, layer: int) -> UnsupportedError:
    return UnsupportedError(
        f"the model reads {what} of layer {layer} of its cache itself, instead of asking the cache",
        hint="only models that store and read through the methods of transformers' Cache can be compiled",
    )


class _Recording:
    """A cache of `total - sequence` positions in each of `layers` layers.

    With `whole`, layers receive past and new keys and values together.
    """

    def __init__(self, capture: Capture, total: Any, sequence: Any, layers: int, *, whole: bool) -> None:
        self.capture = capture
        self.total = total
        self.sequence = sequence
        self.past = total - sequence
        self.whole = whole
        self.count = layers
        self.layers: Any = _Layers(self, layers)
        self.wholes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return self.count

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.capture.updates[int(layer_idx)] = (key_states, value_states)
        self.capture.last_update = int(layer_idx)
        if self.whole:
            self.wholes[int(layer_idx)] = extend_cache(self, key_states, value_states, int(layer_idx))
            return self.wholes[int(layer_idx)]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.total if int(layer_idx) in self.capture.updates else self.past

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        length = query_length.shape[0] if hasattr(query_length, "shape") else query_length
        return self.get_seq_length(layer_idx) + length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Return None, so that the code for several tokens is traced; the captured node has the past."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Return None as `get_conv_state` does."""

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        self.capture.convolved.append((conv_states, StateKey(int(layer_idx), int(state_idx))))
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        numbers = self.capture.recurrences_of(recurrent_states)
        if numbers is None:
            raise UnknownStateError(
                f"layer {int(layer_idx)} keeps a recurrent state that no known kernel computes",
                hint=STATES_HINT,
            )
        self.capture.states[numbers] = StateKey(int(layer_idx), int(state_idx))
        return recurrent_states

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        if not self.whole:
            raise UnsupportedError(
                f"layer {int(layer_idx)} selects the tokens that it attends to by an index of its own keys"
            )
        return extend_index(self, indexer_key_states, int(layer_idx))

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.count

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self.count

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * self.count


@cache
def tracing_cache_class(own: type | None = None) -> type:
    """Define the class on first use, so that importing this module does not import torch.

    Args:
        own: The class of cache that the model makes itself; None for any.
    """
    from transformers.cache_utils import Cache

    base: Any = own if own is not None and issubclass(own, Cache) else Cache

    class TracingCache(_Recording, base):  # type: ignore[misc]
        """The cache that a model gets while it is traced."""

    return TracingCache


def extend_cache(
    past: Any, keys: torch.Tensor, values: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join past and new keys and values of one layer in one node; (batch, kv_heads, total, width) each."""
    import torch

    if keys.ndim != 4 or values.ndim != 4 or str(keys.shape[2]) != str(past.sequence):
        raise UnsupportedError(
            f"layer {layer} stores keys of shape {tuple(keys.shape)}, not (batch, heads, sequence, width)"
        )
    if layer in past.capture.stored:
        raise UnsupportedError(
            f"layer {layer} stores keys twice in one step; one cache slot cannot hold both"
        )
    heads, key_width, value_width = int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3])
    past.capture.stored[layer] = StoredKeys(heads, key_width, value_width)
    batch = keys.shape[0]
    whole = torch.onnx.ops.symbolic_multi_out(
        f"{TRACE}::{EXTEND}",
        (keys, values),
        attrs={"layer": layer},
        dtypes=(keys.dtype, values.dtype),
        shapes=((batch, heads, past.total, key_width), (batch, heads, past.total, value_width)),
        version=1,
    )
    return whole[0], whole[1]


def extend_index(past: Any, keys: torch.Tensor, layer: int) -> torch.Tensor:
    """Join past and new keys of one layer's index in one node; (batch, total, width)."""
    import torch

    if keys.ndim != 3 or str(keys.shape[1]) != str(past.sequence):
        raise UnsupportedError(
            f"layer {layer} stores an index of shape {tuple(keys.shape)}, not (batch, sequence, width)"
        )
    if layer in past.capture.indexed:
        raise UnsupportedError(f"layer {layer} stores an index twice in one step")
    past.capture.indexed.add(layer)
    return torch.onnx.ops.symbolic(
        f"{TRACE}::{INDEX}",
        (keys,),
        attrs={"layer": layer},
        dtype=keys.dtype,
        shape=(keys.shape[0], past.total, keys.shape[2]),
        version=1,
    )
