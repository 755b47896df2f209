"""Every figure that a gate can hold an artifact to: its name, its unit, and which direction is better.

`llmc.validate` measures each. Gates, reports and the comparison with an earlier release read this table.
"""

from dataclasses import dataclass
from enum import StrEnum


class Better(StrEnum):
    """Whether an artifact is better where a figure is smaller, or where it is larger."""

    LESS = "less"
    MORE = "more"


class Metric(StrEnum):
    """Names of the figures, `area.figure`, in the order in which merged targets have their gates."""

    FILES = "files.mismatches"
    GATES = "gates.mismatches"
    GRAPH = "graph.mismatches"
    ORIGINAL = "original.mismatches"
    INTERFACE = "interface.mismatches"
    SERVING = "serving.mismatches"
    TOKENIZER_EQUAL = "tokenizer.equal_fraction"
    CHAT_EQUAL = "chat.equal_fraction"
    WEIGHTS_EXACT = "weights.mismatches"
    WEIGHTS_SNR = "weights.snr_db"
    WEIGHTS_BLOCK_SNR = "weights.block_snr_db"
    WEIGHTS_MAX_STEPS = "weights.max_steps"
    POSITIONS = "positions.verified"
    PASSES_MAX_ABS = "passes.max_abs"
    PREFILL_MAX_ABS = "prefill.max_abs"
    CHUNKS_MAX_ABS = "chunks.max_abs"
    DECODE_MAX_ABS = "decode.max_abs"
    DECODE_TOP1 = "decode.top1_agreement"
    RAGGED_MAX_ABS = "ragged.max_abs"
    WINDOW_MAX_ABS = "window.max_abs"
    CACHE_KL_MEAN = "cache.kl_mean"
    CACHE_KL_MAX = "cache.kl_max"
    ROUNDING_KL_MEAN = "rounding.kl_mean"
    ROUNDING_KL_RATIO = "rounding.kl_ratio"
    ROUNDING_NOISE_RATIO = "rounding.noise_ratio"
    ROUNDING_POSITION_RATIO = "rounding.position_ratio"
    ROUNDING_TOKEN_RATIO = "rounding.token_ratio"
    TEXT_KL_MEAN = "text.kl_mean"
    TEXT_KL_P99 = "text.kl_p99"
    TEXT_KL_MAX = "text.kl_max"
    TEXT_TOP1 = "text.top1_agreement"
    TEXT_TOP5 = "text.top5_agreement"
    TEXT_KL_RATIO = "text.kl_ratio"
    TEXT_PERPLEXITY_RATIO = "text.perplexity_ratio"
    TASK_ACCURACY_CHANGE = "task.accuracy_change"
    GENERATE_EQUAL = "generate.equal_fraction"
    GENERATE_GAP = "generate.logit_gap"
    GENERATE_SEEDED = "generate.seeded_fraction"
    TTFT_RATIO = "latency.ttft_ratio"
    INTER_TOKEN_RATIO = "latency.inter_token_ratio"
    PREVIOUS_RATIO = "latency.previous_ratio"

    @property
    def definition(self) -> "Definition":
        """Its row of the table."""
        return DEFINITIONS[self]

    @property
    def area(self) -> str:
        """What it speaks of, such as `text`: the name up to the dot."""
        return self.value.partition(".")[0]


@dataclass(frozen=True)
class Definition:
    """What a figure means.

    Args:
        unit: `places` that differ, `logits`, `nats per token`, `steps` between neighbouring codes, `dB`, a
            `share` in 0..1, or what is divided by or subtracted from what.
        better: Which direction is better.
        noisy: It depends on what else the machine does, so that it fails a gate only with its whole interval.
    """

    unit: str
    better: Better
    noisy: bool = False

    @property
    def may_be_infinite(self) -> bool:
        """Whether infinity is a figure: the ratio of a signal to no noise at all."""
        return self.unit == "dB"


DEFINITIONS = {
    Metric.FILES: Definition("places", Better.LESS),
    Metric.GATES: Definition("places", Better.LESS),
    Metric.GRAPH: Definition("places", Better.LESS),
    Metric.ORIGINAL: Definition("places", Better.LESS),
    Metric.INTERFACE: Definition("places", Better.LESS),
    Metric.SERVING: Definition("places", Better.LESS),
    Metric.TOKENIZER_EQUAL: Definition("share", Better.MORE),
    Metric.CHAT_EQUAL: Definition("share", Better.MORE),
    Metric.WEIGHTS_EXACT: Definition("places", Better.LESS),
    Metric.WEIGHTS_SNR: Definition("dB", Better.MORE),
    Metric.WEIGHTS_BLOCK_SNR: Definition("dB", Better.MORE),
    Metric.WEIGHTS_MAX_STEPS: Definition("steps", Better.LESS),
    Metric.POSITIONS: Definition("tokens", Better.MORE),
    Metric.PASSES_MAX_ABS: Definition("logits", Better.LESS),
    Metric.PREFILL_MAX_ABS: Definition("logits", Better.LESS),
    Metric.CHUNKS_MAX_ABS: Definition("logits", Better.LESS),
    Metric.DECODE_MAX_ABS: Definition("logits", Better.LESS),
    Metric.DECODE_TOP1: Definition("share", Better.MORE),
    Metric.RAGGED_MAX_ABS: Definition("logits", Better.LESS),
    Metric.WINDOW_MAX_ABS: Definition("logits", Better.LESS),
    Metric.CACHE_KL_MEAN: Definition("nats per token", Better.LESS),
    Metric.CACHE_KL_MAX: Definition("nats per token", Better.LESS),
    Metric.ROUNDING_KL_MEAN: Definition("nats per token", Better.LESS),
    Metric.ROUNDING_KL_RATIO: Definition("divergence / divergence by even noise", Better.LESS),
    Metric.ROUNDING_NOISE_RATIO: Definition("difference / standard deviation of the logits", Better.LESS),
    Metric.ROUNDING_POSITION_RATIO: Definition("worst position / median position", Better.LESS),
    Metric.ROUNDING_TOKEN_RATIO: Definition("worst token / median token", Better.LESS),
    Metric.TEXT_KL_MEAN: Definition("nats per token", Better.LESS),
    Metric.TEXT_KL_P99: Definition("nats per token", Better.LESS),
    Metric.TEXT_KL_MAX: Definition("nats per token", Better.LESS),
    Metric.TEXT_TOP1: Definition("share", Better.MORE),
    Metric.TEXT_TOP5: Definition("share", Better.MORE),
    Metric.TEXT_KL_RATIO: Definition("artifact / plain rounding", Better.LESS),
    Metric.TEXT_PERPLEXITY_RATIO: Definition("artifact / original", Better.LESS),
    Metric.TASK_ACCURACY_CHANGE: Definition("artifact - original", Better.MORE),
    Metric.GENERATE_EQUAL: Definition("share", Better.MORE),
    Metric.GENERATE_GAP: Definition("logits", Better.LESS),
    Metric.GENERATE_SEEDED: Definition("share", Better.MORE),
    Metric.TTFT_RATIO: Definition("artifact / original", Better.LESS, noisy=True),
    Metric.INTER_TOKEN_RATIO: Definition("artifact / original", Better.LESS, noisy=True),
    Metric.PREVIOUS_RATIO: Definition("artifact / earlier artifact", Better.LESS, noisy=True),
}
