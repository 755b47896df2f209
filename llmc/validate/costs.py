"""Forecast the cost of verifying positions from sizes alone, so that an artifact is always verified alike.

The forecast is in seconds of two cores of a server of 2023. It does not measure the machine at hand, whose
load would otherwise decide which positions are verified.
"""

import math
from dataclasses import dataclass
from typing import Any

from llmc.architecture import values_by_layer
from llmc.graph.interface import Interface

#: Floating-point operations per second of the original and of the artifact when many tokens run together.
_ORIGINAL_RATE = 150e9
_ARTIFACT_RATE = 300e9
#: Attention scores (one query, one key, one head) per second, on either side.
_SCORE_RATE = 2e9
#: The same where attention is computed in plain operators, each of which writes all scores to memory.
_PLAIN_SCORE_RATE = 5e7
#: Values of states of fixed size updated per second, by the original and by the artifact.
_ORIGINAL_STATE_RATE = 4e9
_ARTIFACT_STATE_RATE = 1.5e9
#: Weights read per second by a step of one token.
_STEP_RATE = 3e9
#: Bytes per second at which every run copies a cache of fixed length.
_COPY_RATE = 4e9
#: Fixed overhead of a run, in seconds.
_RUN = 4e-4


@dataclass(frozen=True)
class Costs:
    """The sizes of a model that determine the cost of a run.

    Args:
        parameters: Number of parameters of the original.
        scores: Layers times attention heads: the number of scores of one pair of a query and a key.
        width: Width of a head.
        cache_bytes: Bytes of one token in the KV cache.
        capacity: Slots of a cache of fixed length, all of which every run reads and writes; 0 for one that
            grows or is shared.
        states: Values of states of fixed size, all of which every token updates.
        plain: How many of `scores` are computed in plain operators, by the original as well.
    """

    parameters: int
    scores: int
    width: int
    cache_bytes: int
    capacity: int = 0
    states: int = 0
    plain: int = 0

    def original(self, tokens: int, rows: int = 1) -> float:
        """Forecast the seconds of one pass of the original over `rows` sequences of `tokens`."""
        pairs = rows * tokens * (tokens + 1) / 2
        return self._seconds(rows * tokens, pairs, _ORIGINAL_RATE, _ORIGINAL_STATE_RATE)

    def run(self, new: int, past: int = 0, rows: int = 1) -> float:
        """Forecast the seconds of one run of the artifact over `new` tokens of each row after `past`."""
        pairs = rows * new * (self.capacity or past + (new + 1) / 2)
        read = self.parameters / _STEP_RATE + 2 * rows * self.capacity * self.cache_bytes / _COPY_RATE
        return _RUN + max(read, self._seconds(rows * new, pairs, _ARTIFACT_RATE, _ARTIFACT_STATE_RATE))

    def _seconds(self, tokens: int, pairs: float, rate: float, state_rate: float) -> float:
        operations = 2 * self.parameters * tokens + 4 * self.scores * self.width * pairs
        updates = self.states * tokens / state_rate
        scores = (self.scores - self.plain) * pairs / _SCORE_RATE + self.plain * pairs / _PLAIN_SCORE_RATE
        return operations / rate + scores + updates


def model_costs(interface: Interface, config: Any, parameters: int, plain_layers: int = 0) -> Costs:
    """Read the sizes from a graph's interface and from the transformers configuration of its original.

    Args:
        plain_layers: Layers that compute attention in plain operators.
    """
    bits = {spec.name: bits_of(spec.dtype) for spec in interface.inputs}
    heads = max(int(heads or 1) for heads in values_by_layer(config, "num_attention_heads"))
    slots = interface.cache
    cache_bytes = sum(
        s.kv_heads * (s.key_width * bits[s.past_key] + s.value_width * bits[s.past_value]) // 8 for s in slots
    )
    capacity = (interface.max_length or 0) if interface.static_cache else 0
    width = max((s.key_width for s in slots), default=1)
    states = sum(math.prod(state.shape) for state in interface.states)
    scores = heads * (len(slots) if interface.states else max(1, len(slots)))
    plain = 0 if interface.static_cache else min(scores, heads * plain_layers)
    return Costs(parameters, scores, width, cache_bytes, capacity, states, plain)


def bits_of(dtype: str) -> int:
    """Return the bits of an element type by its name: 16 for "bfloat16"."""
    return int("".join(c for c in dtype if c.isdigit()))
