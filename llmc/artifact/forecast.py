"""What an engine can be expected to do on a GPU that is not at hand: arithmetic on data sheets."""

from llmc.records import Record


class Forecast(Record):
    """Bounds by the roofline (Williams, Waterman and Patterson 2009): no run on that GPU can be faster.

    Args:
        profile: The hardware, with the printed peaks of its maker.
        weight_bytes: Weights that a decode step reads.
        kv_bytes: Keys and values of one token.
        largest_batch: Rows that fit into the memory with a full KV cache each; 0 if not even one does.
        largest_context: Slots of the KV cache that fit with one row, whatever the engine's kv_capacity.
        tokens_per_s: One row with a full KV cache: bandwidth / (weights + keys and values).
        ttft_ms: A prompt of `prompt_tokens`, one row: the longer of reading the weights once and two
            operations per weight and token at the dense peak rate of the fastest type that products are
            computed in; None where the profile does not state it.
    """

    profile: str
    weight_bytes: int
    kv_bytes: int
    largest_batch: int | None
    largest_context: int | None
    tokens_per_s: float | None
    prompt_tokens: int
    ttft_ms: float | None

    def render(self) -> str:
        """One line for a terminal."""
        rate = "unknown" if self.tokens_per_s is None else f"at most {self.tokens_per_s:.0f} tokens/s"
        first = "" if self.ttft_ms is None else f", first token after {self.ttft_ms:.2f} ms or more"
        return f"  forecast for {self.profile}, not measured: {rate}{first}, batch {self.largest_batch} fits"
