"""The table of metrics: every figure that a gate can hold an artifact to, one line each.

`llmc.validate` measures each. Gates, reports, tuning and the comparison with an earlier release read it.
"""

from enum import Enum, StrEnum
from typing import Self


class Better(StrEnum):
    """The direction in which a figure is better: smaller or larger."""

    LESS = "less"
    MORE = "more"


class Unit(StrEnum):
    """What a figure counts, or what is divided by or subtracted from what."""

    PLACES = "places"
    SHARE = "share"
    TOKENS = "tokens"
    LOGITS = "logits"
    NATS = "nats per token"
    DECIBELS = "dB"
    STEPS = "steps"
    TO_ORIGINAL = "artifact / original"
    TO_EARLIER = "artifact / earlier artifact"
    TO_ROUNDING = "artifact / plain rounding"
    TO_NOISE = "divergence / divergence by even noise"
    TO_SPREAD = "difference / standard deviation of the logits"
    TO_POSITION = "worst position / median position"
    TO_MAGNITUDE = "difference / magnitude"
    TO_RANGE = "scale / scale that spans the text, or its inverse"
    TO_TOKEN = "worst token / median token"
    CHANGE = "artifact - original"


class Interval(StrEnum):
    """How the confidence interval of a figure is made."""

    NONE = "none: a count, an extreme, or a value that is exact"
    SAMPLE = "mean of independent windows or items, by Student's t"
    MACHINE = "repeated timings, which depend on what else the machine does"


class Family(Enum):
    """Metrics that are measured together and treated alike.

    Args:
        needs_own_weights: They compare with the original that has the artifact's own weights.
        restated: They bound what quantization may lose: `llmc tune` sets new bounds on them.
    """

    FILES = "what is in the files"
    CONTENTS = "weights as a build stores them", False, True
    TOKENS = "tokens of text"
    WEIGHTS = "weights beside the original's", False, True
    COVERAGE = "what was looked at"
    ITSELF = "the original beside itself"
    PASSES = "the graph before and after each pass"
    PARITY = "logits, level by level", True
    CACHE = "attention as it is served", True
    SCALES = "scales of the KV cache"
    ROUNDING = "the program as it is served beside the one in float32", True
    TEXT = "quality on text", False, True
    TASK = "quality on a task"
    GENERATION = "generated text", True
    RANKS = "files of ranks beside the whole weights"
    SERVER = "what servers compute from the checkpoint"
    LATENCY = "time"

    def __init__(self, subject: str, needs_own_weights: bool = False, restated: bool = False) -> None:
        self.subject = subject
        self.needs_own_weights = needs_own_weights
        self.restated = restated

    @property
    def metrics(self) -> tuple["Metric", ...]:
        """Its metrics, in the order of the table."""
        return tuple(metric for metric in Metric if metric.family is self)


_LESS, _MORE = Better.LESS, Better.MORE


class Metric(StrEnum):
    """The names of the figures, `area.figure`, in the order of the gates of merged targets."""

    FILES = "files.mismatches", Unit.PLACES, _LESS, Family.FILES
    GATES = "gates.mismatches", Unit.PLACES, _LESS, Family.FILES
    GRAPH = "graph.mismatches", Unit.PLACES, _LESS, Family.FILES
    ORIGINAL = "original.mismatches", Unit.PLACES, _LESS, Family.FILES
    INTERFACE = "interface.mismatches", Unit.PLACES, _LESS, Family.FILES
    SERVING = "serving.mismatches", Unit.PLACES, _LESS, Family.FILES
    TOKENIZER_EQUAL = "tokenizer.equal_fraction", Unit.SHARE, _MORE, Family.TOKENS
    CHAT_EQUAL = "chat.equal_fraction", Unit.SHARE, _MORE, Family.TOKENS
    WEIGHTS_EXACT = "weights.mismatches", Unit.PLACES, _LESS, Family.CONTENTS
    WEIGHTS_SNR = "weights.snr_db", Unit.DECIBELS, _MORE, Family.WEIGHTS
    WEIGHTS_BLOCK_SNR = "weights.block_snr_db", Unit.DECIBELS, _MORE, Family.WEIGHTS
    WEIGHTS_MAX_STEPS = "weights.max_steps", Unit.STEPS, _LESS, Family.WEIGHTS
    POSITIONS = "positions.verified", Unit.TOKENS, _MORE, Family.COVERAGE
    ORIGINAL_DECODE = "original.decode_max_abs", Unit.LOGITS, _LESS, Family.ITSELF
    PASSES_MAX_ABS = "passes.max_abs", Unit.LOGITS, _LESS, Family.PASSES
    PREFILL_MAX_ABS = "prefill.max_abs", Unit.LOGITS, _LESS, Family.PARITY
    CHUNKS_MAX_ABS = "chunks.max_abs", Unit.LOGITS, _LESS, Family.PARITY
    DECODE_MAX_ABS = "decode.max_abs", Unit.LOGITS, _LESS, Family.PARITY
    DECODE_TOP1 = "decode.top1_agreement", Unit.SHARE, _MORE, Family.PARITY
    RAGGED_MAX_ABS = "ragged.max_abs", Unit.LOGITS, _LESS, Family.PARITY
    WINDOW_MAX_ABS = "window.max_abs", Unit.LOGITS, _LESS, Family.PARITY
    CACHE_KL_MEAN = "cache.kl_mean", Unit.NATS, _LESS, Family.CACHE
    CACHE_KL_MAX = "cache.kl_max", Unit.NATS, _LESS, Family.CACHE
    CACHE_SCALE_RATIO = "cache.scale_ratio", Unit.TO_RANGE, _LESS, Family.SCALES
    ROUNDING_KL_MEAN = "rounding.kl_mean", Unit.NATS, _LESS, Family.ROUNDING
    ROUNDING_KL_RATIO = "rounding.kl_ratio", Unit.TO_NOISE, _LESS, Family.ROUNDING
    ROUNDING_NOISE_RATIO = "rounding.noise_ratio", Unit.TO_SPREAD, _LESS, Family.ROUNDING
    ROUNDING_POSITION_RATIO = "rounding.position_ratio", Unit.TO_POSITION, _LESS, Family.ROUNDING
    ROUNDING_TOKEN_RATIO = "rounding.token_ratio", Unit.TO_TOKEN, _LESS, Family.ROUNDING
    TEXT_KL_MEAN = "text.kl_mean", Unit.NATS, _LESS, Family.TEXT, Interval.SAMPLE
    TEXT_KL_P99 = "text.kl_p99", Unit.NATS, _LESS, Family.TEXT
    TEXT_KL_MAX = "text.kl_max", Unit.NATS, _LESS, Family.TEXT
    TEXT_TOP1 = "text.top1_agreement", Unit.SHARE, _MORE, Family.TEXT, Interval.SAMPLE
    TEXT_TOP5 = "text.top5_agreement", Unit.SHARE, _MORE, Family.TEXT, Interval.SAMPLE
    TEXT_KL_RATIO = "text.kl_ratio", Unit.TO_ROUNDING, _LESS, Family.TEXT, Interval.SAMPLE
    TEXT_PERPLEXITY_RATIO = "text.perplexity_ratio", Unit.TO_ORIGINAL, _LESS, Family.TEXT, Interval.SAMPLE
    TASK_ACCURACY_CHANGE = "task.accuracy_change", Unit.CHANGE, _MORE, Family.TASK, Interval.SAMPLE
    GENERATE_EQUAL = "generate.equal_fraction", Unit.SHARE, _MORE, Family.GENERATION
    GENERATE_GAP = "generate.logit_gap", Unit.LOGITS, _LESS, Family.GENERATION
    GENERATE_SEEDED = "generate.seeded_fraction", Unit.SHARE, _MORE, Family.GENERATION
    RANKS_EXACT = "ranks.mismatches", Unit.PLACES, _LESS, Family.RANKS
    RANKS_MAX_ABS = "ranks.max_abs", Unit.LOGITS, _LESS, Family.RANKS
    SERVER_SKIPPED = "server.skipped_tensors", Unit.PLACES, _LESS, Family.SERVER
    SERVER_WEIGHTS = "server.weights_mismatches", Unit.PLACES, _LESS, Family.SERVER
    SERVER_PRODUCT = "server.product_max_rel", Unit.TO_MAGNITUDE, _LESS, Family.SERVER
    SERVER_TOKENIZER = "server.tokenizer_equal", Unit.SHARE, _MORE, Family.SERVER
    SERVER_LOGPROB = "server.logprob_max_abs", Unit.NATS, _LESS, Family.SERVER
    SERVER_KL_MEAN = "server.kl_mean", Unit.NATS, _LESS, Family.SERVER
    SERVER_PERPLEXITY_RATIO = "server.perplexity_ratio", Unit.TO_ORIGINAL, _LESS, Family.SERVER
    SERVER_GREEDY_GAP = "server.greedy_gap", Unit.LOGITS, _LESS, Family.SERVER
    TTFT_RATIO = "latency.ttft_ratio", Unit.TO_ORIGINAL, _LESS, Family.LATENCY, Interval.MACHINE
    INTER_TOKEN_RATIO = "latency.inter_token_ratio", Unit.TO_ORIGINAL, _LESS, Family.LATENCY, Interval.MACHINE
    PREVIOUS_RATIO = "latency.previous_ratio", Unit.TO_EARLIER, _LESS, Family.LATENCY, Interval.MACHINE

    unit: Unit
    better: Better
    family: Family
    interval: Interval

    def __new__(
        cls, name: str, unit: Unit, better: Better, family: Family, interval: Interval = Interval.NONE
    ) -> Self:
        """Make the member whose value is its name alone, as YAML and JSON have it.

        Args:
            unit: What the figure counts.
            better: Which direction is better.
            family: Metrics that are measured with it and treated alike.
            interval: How its confidence interval is made.
        """
        metric = str.__new__(cls, name)
        metric._value_ = name
        metric.unit, metric.better, metric.family, metric.interval = unit, better, family, interval
        return metric

    @property
    def area(self) -> str:
        """The subject of the metric, such as `text`: the name up to the dot."""
        return self.value.partition(".")[0]

    @property
    def may_be_infinite(self) -> bool:
        """Whether infinity is a figure: the ratio of a signal to no noise at all."""
        return self.unit is Unit.DECIBELS

    @property
    def is_noisy(self) -> bool:
        """Whether it depends on what else the machine does: it fails a gate only with its whole interval."""
        return self.interval is Interval.MACHINE

    @property
    def is_logit_difference(self) -> bool:
        """Whether it is a largest difference of logits, of one graph or program from another."""
        return self.unit is Unit.LOGITS and self.family in (Family.PASSES, Family.PARITY)
