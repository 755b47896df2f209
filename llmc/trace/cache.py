"""A transformers `Cache` for tracing: it hands each step's keys and values straight through."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from llmc.errors import UnsupportedError

if TYPE_CHECKING:
    from llmc.trace.capture import Capture


@cache
def tracing_cache_class() -> type:
    """The class, made on first use so that importing this module does not import torch."""
    from transformers.cache_utils import Cache

    class TracingCache(Cache):
        """Stands for a cache of `past` positions in each of `layers` layers."""

        def __init__(self, capture: Capture, past: Any, layers: int) -> None:
            self.capture = capture
            self.past = past
            self.count = layers
            self.layers: list[Any] = []

        def __len__(self) -> int:
            return self.count

        def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
            self.capture.updates[int(layer_idx)] = (key_states, value_states)
            self.capture.last_update = int(layer_idx)
            return key_states, value_states

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            return self.past

        def get_query_offset(self, layer_idx: int = 0) -> Any:
            return self.past

        def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
            length = query_length.shape[0] if hasattr(query_length, "shape") else query_length
            return self.past + length, 0

        def get_max_length(self, layer_idx: int | None = None) -> int:
            return -1

        def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
            return bool(self._refuse_state())

        def _refuse_state(self, *_: Any, **__: Any) -> Any:
            raise UnsupportedError(
                "the model keeps a convolution or recurrent state between steps",
                hint="models with linear attention or state-space layers are not supported yet",
            )

        update_conv_state = update_recurrent_state = update_indexer = _refuse_state
        get_conv_state = get_recurrent_state = _refuse_state

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

    return TracingCache
