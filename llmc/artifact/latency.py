"""Record timings of an artifact beside its original."""

from llmc.records import Strict


class Timing(Strict):
    """The statistics of one duration in milliseconds; percentiles by linear interpolation."""

    n: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float


class Ratio(Strict):
    """The ratio artifact / original of two interleaved series: of medians, and the range over the rounds."""

    value: float
    low: float
    high: float


class PrefillLatency(Strict):
    """The time to first token for a prompt of `prompt_tokens`, batch 1; rates in prompt tokens per second.

    `noise` is as for decode. Reports of earlier releases have no rates.
    """

    prompt_tokens: int
    artifact: Timing
    original: Timing
    ratio: Ratio
    noise: float
    artifact_tokens_per_s: float | None = None
    original_tokens_per_s: float | None = None


class DecodeLatency(Strict):
    """The inter-token latency after `context` tokens, batch 1.

    Rates are in tokens/s, energy in joules per token: of the processor, and of the GPU that is used.

    `noise` is the effect of the machine alone on a ratio: by how much two series of the same artifact,
    interleaved with the original's, may differ from each other, as a fraction.
    """

    context: int
    artifact: Timing
    original: Timing
    artifact_tokens_per_s: float
    original_tokens_per_s: float
    ratio: Ratio
    noise: float
    artifact_joules_per_token: float | None = None
    original_joules_per_token: float | None = None
    artifact_gpu_joules_per_token: float | None = None
    original_gpu_joules_per_token: float | None = None


class Footprint(Strict):
    """The load time and memory of one side alone in a process.

    Args:
        load: Time to load the weights, without importing the runtime's modules.
        peak_bytes: Highest resident set over load, prefill and decode; None if the operating
            system does not report it.
        steady_bytes: Resident set after the last step, when no work on the prompt remains;
            the median of the processes.
        gpu_bytes: Memory of the GPU that was taken from before the load until after the last step, without
            CUDA's context; runtimes keep what they allocated. None if the GPU was not used.
        prompt_tokens: Length of the prompt that was prefilled before `decoded_tokens` steps.
    """

    load: Timing
    peak_bytes: int | None
    steady_bytes: int | None
    gpu_bytes: int | None = None
    prompt_tokens: int
    decoded_tokens: int


class Roofline(Strict):
    """The least time of a decode step that reads every byte once at peak bandwidth.

    Args:
        weight_bytes: Weights read per token; an embedding table that is only looked up is not counted.
        kv_bytes: Keys, values and states read per token at this context.
        bandwidth_gbs: The profile's peak bandwidth, 10**9 bytes/s; None if the profile states none.
        bound_ms: (weight_bytes + kv_bytes) / bandwidth.
        fraction: bound_ms / measured median.
    """

    context: int
    weight_bytes: int
    kv_bytes: int
    bandwidth_gbs: float | None
    bound_ms: float | None
    fraction: float | None


class BatchLatency(Strict):
    """The latency of `batch` equal rows at once, interleaved with the original's.

    Args:
        context: Tokens of each row's prompt, after which decode steps are timed.
        ttft: Time to first token of the artifact.
        artifact: Inter-token latency of the artifact.
        tokens_per_s: Rate of the artifact, summed over all rows.
        ratio: Ratio of inter-token latencies.
    """

    batch: int
    context: int
    ttft: Timing
    ttft_original: Timing
    artifact: Timing
    original: Timing
    ratio: Ratio
    tokens_per_s: float
    original_tokens_per_s: float


class OperatorTime(Strict):
    """The time of one kind of operator in a decode step, by the runtime's own profiler.

    Args:
        name: Operator, with its domain unless it is a standard one.
        calls: Number of calls in one step.
        ms: Milliseconds in one step, the mean of several.
    """

    name: str
    calls: int
    ms: float


class StepWay(Strict):
    """The time of a decode step of the artifact by one way to run it, after `context` tokens.

    Args:
        where: Runtime, provider and way.
        step: Time of a step.
    """

    where: str
    context: int
    step: Timing


class Latency(Strict):
    """The latency of artifact and original, measured in turn in one process.

    Args:
        where: Runtime and provider of the artifact.
        original: Runtime of the original, such as "torch 2.13.0 float32 sdpa, dynamic cache".
        threads: Intra-op threads of either side.
        ways: Ways to run a decode step, of which the fastest was measured; empty if there is only one.
        apart: Why artifact and original ran on different kinds of devices; None if they did not.
        energy: The counters by which joules are measured, or why there are none.
        batches: Latency of decoding in batches.
        operators: Operators of a decode step at the first context, the slowest first.
        dropped: Lengths that were not measured because the model has fewer positions, and why.
    """

    where: str
    original: str
    threads: int
    prefill: tuple[PrefillLatency, ...]
    decode: tuple[DecodeLatency, ...]
    roofline: tuple[Roofline, ...]
    artifact_footprint: Footprint
    original_footprint: Footprint
    ways: tuple[StepWay, ...] = ()
    apart: str | None = None
    energy: str = "not measured"
    batches: tuple[BatchLatency, ...] = ()
    operators: tuple[OperatorTime, ...] = ()
    dropped: tuple[str, ...]
