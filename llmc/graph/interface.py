"""What a model exchanges with its runtime: inputs, outputs and the KV cache between steps."""

from typing import Literal

from llmc.records import Record

Padding = Literal["left", "right", "any", "none"]

#: Input of graphs whose KV cache has a fixed length, in the place of attention_mask and position_ids:
#: (batch,) int64, the slot of each row's first new token.
WRITE_INDICES = "write_indices"
#: Input beside it of graphs with the logits of the last token only: (batch,) int64, the real new tokens of
#: each row of this step; the pads behind them do not count.
TOKEN_COUNTS = "token_counts"
#: Value of graphs with the logits of the last token only: (batch, 1, 1) int64, its place in the step.
CHOSEN_TOKENS = "last/index"


#: Elements of a row of an int8 KV cache besides its numbers: a float32, its scale (llmc/kernels/cache.h).
SCALE_BYTES = 4


def unscaled_width(dtype: str, width: int) -> int:
    """Numbers of a row of a KV cache of `width` elements."""
    return width - SCALE_BYTES if dtype == "int8" else width


class TensorSpec(Record):
    """Name, element type (`float32`, `int64`, …) and shape; a string is a named dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class CacheSlot(Record):
    """Keys and values of one decoder layer, as inputs (past) and outputs (present).

    Keys are (batch, kv_heads, past or total, key_width), values likewise with value_width; `window`
    is the number of most recent positions a query may see, None for all of them.
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
        """Past and present of the keys, then of the values."""
        return (self.past_key, self.present_key), (self.past_value, self.present_value)

    @property
    def pasts(self) -> tuple[str, str]:
        """Inputs: past keys and values."""
        return self.past_key, self.past_value

    @property
    def names(self) -> tuple[str, str, str, str]:
        """Inputs and outputs: past keys and values, then present ones."""
        return self.past_key, self.past_value, self.present_key, self.present_value


class Interface(Record):
    """Everything a runtime needs to know to run prefill and decode.

    Args:
        inputs: All inputs in order, the cache included.
        outputs: All outputs in order, the cache included.
        cache: One slot per attention layer, by layer.
        logits: Whether `logits` has every position of the step or only the last one.
        position_ids: Whether `position_ids` is an input.
        padding: The side on which the shorter rows of a ragged batch are padded; "none" if rows must be
            of equal length.
        max_length: Largest total length the model knows positions for; None if unbounded.
        restart: Total length beyond which the runtime has to compute the KV cache anew from all tokens, once,
            as the original's `generate` does; None if never.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: tuple[CacheSlot, ...]
    logits: Literal["last", "all"]
    position_ids: bool
    padding: Padding
    max_length: int | None
    restart: int | None = None

    @property
    def static_cache(self) -> bool:
        """Whether the KV cache has `max_length` slots from the beginning and is written in place."""
        return any(spec.name == WRITE_INDICES for spec in self.inputs)

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary, the last dimension of `logits`."""
        logits = next(spec for spec in self.outputs if spec.name == "logits")
        return int(logits.shape[-1])
