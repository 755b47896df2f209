"""What a build is asked to do: `Target` (intent) and `BuildPlan`; facts on hardware are `llmc.profile`'s.

All are strict and frozen, and come from YAML through `llmc.catalog`. A variant is
`target.model_copy(update=…)`.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmc.profile import Profile


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Provider(StrEnum):
    """ONNX Runtime execution provider an artifact is lowered for."""

    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """Element type of activations, KV cache and logits."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class CacheType(StrEnum):
    """Element type of the KV cache of compiled kernels; int8 has a scale per token and head."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"


class Metric(StrEnum):
    """Figures a gate can hold an artifact to; `llmc.validate` defines and measures each."""

    FILES = "files.mismatches"
    INTERFACE = "interface.mismatches"
    SERVING = "serving.mismatches"
    TOKENIZER_EQUAL = "tokenizer.equal_fraction"
    CHAT_EQUAL = "chat.equal_fraction"
    WEIGHTS_SNR = "weights.snr_db"
    WEIGHTS_BLOCK_SNR = "weights.block_snr_db"
    WEIGHTS_MAX_STEPS = "weights.max_steps"
    PASSES_MAX_ABS = "passes.max_abs"
    PREFILL_MAX_ABS = "prefill.max_abs"
    CHUNKS_MAX_ABS = "chunks.max_abs"
    DECODE_MAX_ABS = "decode.max_abs"
    RAGGED_MAX_ABS = "ragged.max_abs"
    WINDOW_MAX_ABS = "window.max_abs"
    CACHE_KL_MEAN = "cache.kl_mean"
    CACHE_KL_MAX = "cache.kl_max"
    DECODE_TOP1 = "decode.top1_agreement"
    TEXT_KL_MEAN = "text.kl_mean"
    TEXT_KL_P99 = "text.kl_p99"
    TEXT_KL_MAX = "text.kl_max"
    TEXT_TOP1 = "text.top1_agreement"
    TEXT_TOP5 = "text.top5_agreement"
    TEXT_PERPLEXITY_RATIO = "text.perplexity_ratio"
    TASK_ACCURACY_CHANGE = "task.accuracy_change"
    GENERATE_EQUAL = "generate.equal_fraction"
    GENERATE_GAP = "generate.logit_gap"
    GENERATE_SEEDED = "generate.seeded_fraction"
    TTFT_RATIO = "latency.ttft_ratio"
    INTER_TOKEN_RATIO = "latency.inter_token_ratio"
    PREVIOUS_RATIO = "latency.previous_ratio"


class Gate(_Strict):
    """One threshold on one metric, with the reason for its value.

    Exactly one of `max` and `min` is given. Units: `mismatches` in places that differ, `snr_db` in
    decibels, `max_steps` in distances of neighbouring codes, `max_abs` and `gap` in logits, `kl` in nats per
    token, agreements and fractions in 0..1, `accuracy_change` in -1..1 as artifact - original, ratios as
    artifact / original, `previous_ratio` as artifact / earlier artifact.
    """

    metric: Annotated[Metric, Field(strict=False)]
    max: float | None = None
    min: float | None = None
    reason: Annotated[str, Field(min_length=10)]

    @model_validator(mode="after")
    def _one_bound(self) -> "Gate":
        if (self.max is None) == (self.min is None):
            raise ValueError("give exactly one of max and min")
        return self


class PassSpec(_Strict):
    """One pass of a target, and how often it must apply.

    Args:
        name: Registered name of the pass.
        per_layer: Exact count or [least, most] that it must apply per decoder layer; refusals whose
            code is in `accept` count as applied. None: not asserted.
        accept: Codes of refusals that are fine on this target; any other refusal fails the build.
    """

    name: str
    per_layer: int | tuple[int, int] | None = None
    accept: tuple[str, ...] = ()


class WeightRole(StrEnum):
    """What a matrix is for, which decides its bits.

    RESIDUAL is a projection whose result is added to the residual stream (of attention's output, down
    in the MLP); ROUTER chooses experts, EXPERTS are the stacked matrices of a layer of them; LINEAR is
    any other linear layer.
    """

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    RESIDUAL = "residual"
    ROUTER = "router"
    EXPERTS = "experts"
    LINEAR = "linear"


class WeightScheme(_Strict):
    """How one matrix is stored: integers by block along the input features.

    Args:
        bits: 4 or 8.
        block_size: Input features that share a scale.
        symmetric: True for a fixed zero point of 2**(bits-1), False for one per block.
        method: `rtn` (round to nearest), `mse` (scales searched for least squared error) or `gptq` (the
            same scales, codes that make up for each other's error on calibration text).
    """

    bits: Literal[4, 8]
    block_size: Literal[16, 32, 64, 128]
    symmetric: bool
    method: Literal["rtn", "mse", "gptq"]


Scheme = TypeVar("Scheme", bound=BaseModel)


class Rule(_Strict, Generic[Scheme]):
    """The first rule whose role and name pattern fit decides; `scheme: null` leaves it in float."""

    role: Annotated[WeightRole, Field(strict=False)] | None = None
    match: str = "*"
    scheme: Scheme | None


WeightRule = Rule[WeightScheme]


class CalibrationText(_Strict):
    """How much of the text that ships for calibration the model is run on.

    Args:
        window_tokens: Tokens of one window; windows do not overlap.
        max_windows: Most windows; fewer if the text has no more.
    """

    window_tokens: Annotated[int, Field(ge=16)]
    max_windows: Annotated[int, Field(ge=1)]


class NeuronPruning(_Strict):
    """Neurons of every MLP that are left out.

    Args:
        fraction: Of the neurons of a layer.
        multiple: The nearest multiple of this stays: blocks of quantized weights and kernels want it.
    """

    fraction: Annotated[float, Field(gt=0, lt=1)]
    multiple: Annotated[int, Field(ge=1)]


class Pruning(_Strict):
    """What is left out of the model before it is quantized, chosen by what calibration text shows of it.

    Args:
        calibration: That text.
        repair: Let the weights that stay make up for those that go, by least squares and without training.
        layers: Whole decoder layers.
        mlp: Neurons, as many in each layer.
        kv_groups: In each layer, heads of keys and values with the query heads that share them.
        sparsity: Two of every four neighbouring weights of the layers' matrices are 0, for TensorRT.
    """

    calibration: CalibrationText
    repair: bool
    layers: Annotated[int, Field(ge=0)] = 0
    mlp: NeuronPruning | None = None
    kv_groups: Annotated[int, Field(ge=0)] = 0
    sparsity: Literal["2:4"] | None = None

    @model_validator(mode="after")
    def _something(self) -> "Pruning":
        if not self.layers and self.mlp is None and not self.kv_groups and self.sparsity is None:
            raise ValueError("give at least one of layers, mlp, kv_groups and sparsity")
        return self


class Allocation(_Strict):
    """Mixed precision: how many bits each matrix gets, solved from how much the model's answers need them.

    Exactly one of `budget_bits` and `max_kl` is given.

    Args:
        choices: Schemes that a matrix can get; that of its rule is one more.
        text: Calibration text that sensitivities are measured on.
        budget_bits: Most stored bits by element over all matrices of the model, scales and zero points
            included; within it the least predicted KL divergence is sought.
        max_kl: Most predicted KL divergence, nats per token; within it the fewest bytes are sought.
    """

    choices: Annotated[tuple[WeightScheme, ...], Field(min_length=1)]
    text: CalibrationText
    budget_bits: Annotated[float, Field(gt=0)] | None = None
    max_kl: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> "Allocation":
        if (self.budget_bits is None) == (self.max_kl is None):
            raise ValueError("give exactly one of budget_bits and max_kl")
        return self


class Quantization(_Strict):
    """Weight-only quantization of a target.

    Args:
        accuracy_level: `MatMulNBits` attribute: 0 unset, 1 fp32, 2 fp16 (kernels: int16), 4 int8 activations.
        kept_accuracy: The same, by role, for codes kept from the checkpoint, which lose nothing else.
        scales: Type that scales are stored in: that of the `activations`, as operators take them, or
            `float16`, made float32 when a session starts. Experts have the former.
        rules: Tried in order, per matrix.
        calibration: Text for methods that need it; None if nothing has such a method.
        scale_channels: Scale channels of activations before their weights are calibrated, where that costs
            nothing and helps (AWQ).
        allocation: Decides anew on linear layers that the rules quantize; None leaves it at the rules.
    """

    accuracy_level: Literal[0, 1, 2, 3, 4]
    kept_accuracy: dict[Annotated[WeightRole, Field(strict=False)], Literal[0, 1, 2, 3, 4]] = {}
    scales: Literal["activations", "float16"] = "activations"
    rules: tuple[WeightRule, ...]
    calibration: CalibrationText | None = None
    scale_channels: bool = False
    allocation: Allocation | None = None

    @model_validator(mode="after")
    def _calibrated(self) -> "Quantization":
        schemes = [rule.scheme for rule in self.rules if rule.scheme is not None]
        schemes += self.allocation.choices if self.allocation is not None else ()
        if any(scheme.method == "gptq" for scheme in schemes) != (self.calibration is not None):
            raise ValueError("give calibration if and only if a rule or choice has method gptq")
        if self.scale_channels and self.calibration is None:
            raise ValueError("scale_channels needs calibration")
        return self


class Backend(StrEnum):
    """What an artifact is made of: an ONNX Runtime model, or TensorRT engines."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"


class WeightFormat(StrEnum):
    """Type of a quantized matrix inside of a TensorRT graph; all of them are symmetric."""

    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


class EngineScheme(_Strict):
    """How one matrix of an engine is stored, and in which type its products are computed.

    Args:
        format: int8 and fp8 have a scale per output feature; int4 one per block; nvfp4 one per block of 16
            in fp8, times one per tensor.
        block_size: Input features that share a scale; int4 alone, where it is required.
        activations: `float`: products are computed in the graph's type. `static`: activations are stored in
            `format` too, by one scale each that calibration text decides (int8 and fp8). `dynamic`: in
            nvfp4, by block as they come.
    """

    format: Annotated[WeightFormat, Field(strict=False)]
    block_size: Literal[16, 32, 64, 128] | None = None
    activations: Literal["float", "static", "dynamic"] = "float"

    @property
    def bits(self) -> int:
        """Of one code."""
        return 4 if self.format in (WeightFormat.INT4, WeightFormat.NVFP4) else 8

    @property
    def symmetric(self) -> bool:
        """True: TensorRT takes no zero points."""
        return True

    @model_validator(mode="after")
    def _blocks(self) -> "EngineScheme":
        if (self.format is WeightFormat.INT4) != (self.block_size is not None):
            raise ValueError("block_size goes with int4, which needs it, and with no other format")
        taken = {
            "float",
            {WeightFormat.INT4: "float", WeightFormat.NVFP4: "dynamic"}.get(self.format, "static"),
        }
        if self.activations not in taken:
            options = " or ".join(sorted(taken))
            raise ValueError(f"{self.format.value} takes activations {options}, not {self.activations}")
        return self


EngineRule = Rule[EngineScheme]


class Span(_Strict):
    """Sizes of one dynamic dimension: the least, the one to be fastest at, and the most."""

    least: Annotated[int, Field(ge=1)]
    typical: int
    most: int

    @model_validator(mode="after")
    def _ordered(self) -> "Span":
        if not self.least <= self.typical <= self.most:
            raise ValueError(
                f"least {self.least}, typical {self.typical} and most {self.most} must be in ascending order"
            )
        return self


class Engine(_Strict):
    """What a TensorRT engine is built for.

    Args:
        kv_capacity: Slots of the KV cache, and so the longest prompt and answer together.
        batch: Rows of a batch, in prefill and decode.
        prefill: New tokens of a row in one prefill step; decode always takes one.
        weights: Which matrices are quantized, and how.
        calibration: Text for activations that are quantized; None if no rule quantizes any.
        least_activation_db: Activations whose signal-to-noise ratio on that text is lower as quantized stay
            in float, and so do the products that read them; None keeps none.
    """

    kv_capacity: Annotated[int, Field(ge=2)]
    batch: Span
    prefill: Span
    weights: tuple[EngineRule, ...] = ()
    calibration: CalibrationText | None = None
    least_activation_db: float | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Engine":
        wanted = any(rule.scheme is not None and rule.scheme.activations != "float" for rule in self.weights)
        if wanted != (self.calibration is not None):
            raise ValueError("give calibration if and only if a rule quantizes activations")
        if self.prefill.most > self.kv_capacity:
            raise ValueError(
                f"prefill of {self.prefill.most} tokens does not fit kv_capacity {self.kv_capacity}"
            )
        return self


class Target(_Strict):
    """An intent: backend, passes in order, precision, interface, thresholds. `targets/*.yaml`.

    `quantize` belongs to the backend onnxruntime; `engine` to tensorrt, which needs it.

    Args:
        kernels: `compiled` generates operators for the model and the profile's CPU, and leaves to ONNX
            Runtime what they cannot take.
        kv_cache: Element type of the KV cache, for `compiled` kernels alone; elsewhere it is `dtype`.
        prune: What is left out of the model; parity is to the model without it, quality to the original.
        lookup: Tokens that onnxruntime-genai drafts in a step by prompt lookup, whoever serves the
            artifact. It then refuses batches, and needs logits of all tokens.
    """

    schema_version: Literal[1]
    name: str
    summary: str
    backend: Annotated[Backend, Field(strict=False)]
    provider: Annotated[Provider, Field(strict=False)]
    dtype: Annotated[Dtype, Field(strict=False)]
    logits: Literal["last", "all"]
    kernels: Literal["onnxruntime", "compiled"] = "onnxruntime"
    kv_cache: Annotated[CacheType, Field(strict=False)] | None = None
    passes: tuple[PassSpec, ...]
    quantize: Quantization | None
    engine: Engine | None = None
    prune: Pruning | None = None
    lookup: int | None = None
    gates: tuple[Gate, ...]

    @model_validator(mode="after")
    def _backend_fits(self) -> "Target":
        if (self.backend is Backend.TENSORRT) != (self.engine is not None):
            raise ValueError("engine goes with backend tensorrt, which needs it, and with no other backend")
        if self.backend is Backend.TENSORRT and self.quantize is not None:
            raise ValueError("backend tensorrt takes its formats from engine.weights; quantize must be null")
        if self.backend is not Backend.TENSORRT and self.prune is not None and self.prune.sparsity:
            raise ValueError(
                f"backend {self.backend.value} has no kernels for sparsity {self.prune.sparsity}"
            )
        if self.backend is not Backend.TENSORRT and self.dtype is Dtype.BFLOAT16:
            raise ValueError("bfloat16 goes with backend tensorrt; onnxruntime lacks kernels for it")
        if self.kv_cache is not None and self.kernels != "compiled":
            raise ValueError(
                "kv_cache goes with kernels: compiled; elsewhere the KV cache is of the type dtype"
            )
        if self.backend is Backend.TENSORRT and self.provider is not Provider.CUDA:
            raise ValueError("backend tensorrt needs provider cuda")
        if self.lookup is not None and (self.backend is Backend.TENSORRT or self.logits == "last"):
            raise ValueError("lookup goes with backend onnxruntime and logits of all tokens")
        return self


class BuildPlan(_Strict):
    """One build, fully resolved.

    Args:
        model: As the user wrote it: folder, hub id with optional @revision, GGUF file or `demo`.
        target: The intent.
        profile: The hardware.
        also: Further hardware that the artifact is to run on; engines alone are built for several.
        output: Directory of the artifact.
        verify: Run the parity gate after building.
        eval_text: Files of text for perplexity and KL divergence, `-` for standard input; none for the
            one that ships.
    """

    model: str
    target: Target
    profile: Profile
    also: tuple[Profile, ...] = ()
    output: Path
    verify: bool = True
    eval_text: tuple[str, ...] = ()
