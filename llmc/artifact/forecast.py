"""Forecast the speed of an engine on a GPU that is not at hand, from data sheets."""

from llmc.records import Record


class Forecast(Record):
    """The bounds of the roofline (Williams, Waterman and Patterson 2009): no run on that GPU can be faster.

    Args:
        profile: The hardware, with the peak rates that its maker prints.
        weight_bytes: Bytes of the weights that a decode step reads.
        kv_bytes: Bytes of keys and values of one token.
        largest_batch: Number of rows with a full KV cache each that fit into memory; 0 if not even one does.
        largest_context: Number of slots of the KV cache that fit with one row, whatever the engine's
            kv_capacity.
        tokens_per_s: Rate of one row with a full KV cache: bandwidth / (weights + keys and values).
        ttft_ms: Time of a prompt of `prompt_tokens`, one row: the longer of reading the weights once and of
            two operations per weight and token at the dense peak rate of the fastest type in which products
            are computed; None if the profile does not state it.
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
        """Return one line for a terminal."""
        rate = "unknown" if self.tokens_per_s is None else f"at most {self.tokens_per_s:.0f} tokens/s"
        first = "" if self.ttft_ms is None else f", first token after {self.ttft_ms:.2f} ms or more"
        return f"  forecast for {self.profile}, not measured: {rate}{first}, batch {self.largest_batch} fits"
