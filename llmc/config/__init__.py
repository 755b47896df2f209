"""Define what a build is asked to do: `Target` (intent) and `BuildPlan`; `llmc.profile` has the hardware.

All of them are strict and frozen, and come from YAML through `llmc.catalog`; `model_copy` makes a variant.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmc.config.base import CalibrationText as CalibrationText
from llmc.config.base import Rule as Rule
from llmc.config.base import Scheme as Scheme
from llmc.config.base import WeightRole as WeightRole
from llmc.config.checkpoint import CheckpointFormat as CheckpointFormat
from llmc.config.checkpoint import ServedCheckpoint as ServedCheckpoint
from llmc.config.engine import Engine as Engine
from llmc.config.engine import EngineRule as EngineRule
from llmc.config.engine import EngineScheme as EngineScheme
from llmc.config.engine import Span as Span
from llmc.config.engine import TypedWeights as TypedWeights
from llmc.config.engine import WeightFormat as WeightFormat
from llmc.config.method import METHODS as METHODS
from llmc.config.method import LeastSquares as LeastSquares
from llmc.config.method import Method as Method
from llmc.config.method import NamedMethod, calibrated_methods
from llmc.config.metrics import Better as Better
from llmc.config.metrics import Family as Family
from llmc.config.metrics import Metric as Metric
from llmc.evaluation import EvaluationText, shipped_text
from llmc.profile import Profile, ProfileKind
from llmc.records import Strict


class Provider(StrEnum):
    """The ONNX Runtime execution provider for which an artifact is lowered."""

    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """The element type of activations, KV cache and logits."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class CacheType(StrEnum):
    """The element type of a KV cache.

    Compiled kernels have float32, float16 and int8, which has a scale per token and head. Checkpoints for
    servers have fp8 (E4M3), with one scale for the keys of a layer and one for its values.
    """

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    FP8 = "fp8"


class Gate(Strict):
    """The threshold on one metric, with the reason for its value.

    Exactly one of `max` and `min` is given, in the unit of the metric; see `llmc.config.metrics`.
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


class PassSpec(Strict):
    """The settings of one pass of a target, and how often it must apply.

    Args:
        name: Registered name of the pass.
        per_layer: How often it must apply per decoder layer, or [least, most]; accepted refusals count.
        accept: Codes of refusals that this target tolerates; any other refusal fails the build.
    """

    name: str
    per_layer: int | tuple[int, int] | None = None
    accept: tuple[str, ...] = ()


class WeightScheme(Strict):
    """The storage of one matrix: integers by block along the input features.

    Args:
        bits: 4 or 8.
        block_size: Number of input features that share a scale.
        symmetric: True for a fixed zero point of 2**(bits-1), False for one per block.
        method: Method that finds the codes; see `llmc.config.method`.
    """

    bits: Literal[4, 8]
    block_size: Literal[16, 32, 64, 128]
    symmetric: bool
    method: NamedMethod


WeightRule = Rule[WeightScheme]


class NeuronPruning(Strict):
    """The neurons to leave out of every MLP.

    Args:
        fraction: Fraction of the neurons of a layer to remove.
        multiple: The number that stays is the nearest multiple of this, as quantization blocks and kernels
            need.
    """

    fraction: Annotated[float, Field(gt=0, lt=1)]
    multiple: Annotated[int, Field(ge=1)]


class Pruning(Strict):
    """The parts to leave out of the model before it is quantized, chosen by calibration text.

    Args:
        calibration: The calibration text.
        repair: Whether the remaining weights compensate for the removed ones, by least squares without
            training.
        layers: Number of whole decoder layers to remove.
        mlp: Neurons to remove, equally many in each layer.
        kv_groups: Heads of keys and values to remove in each layer, with the query heads that share them.
        sparsity: Two of every four neighbouring weights of the layers' matrices become 0, for TensorRT.
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


class Allocation(Strict):
    """The settings of mixed precision: the bits of each matrix are solved from its predicted KL divergence.

    Args:
        choices: Schemes that a matrix can get, in addition to its rule's scheme.
        text: Calibration text on which sensitivities are measured.
        budget_bits: Maximum stored bits per element over all matrices of the model, with scales and zero
            points; within it the predicted KL divergence is minimized. Excludes `max_kl`.
        max_kl: Maximum predicted KL divergence, nats per token; within it the bytes are minimized.
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


class Quantization(Strict):
    """The weight-only quantization of a target.

    Args:
        accuracy_level: `MatMulNBits` attribute: 0 unset, 1 fp32, 2 fp16 (kernels: int16), 4 int8 activations.
        kept_accuracy: The same, by role, for codes kept from the checkpoint, which have no other loss.
        scales: Type of stored scales: that of the `activations`, as operators accept it, or `float16`,
            converted to float32 when a session starts. Experts always have the former; scales that a
            checkpoint stores in float16 stay so where its codes are kept. `bfloat16` is for checkpoints:
            servers compute in bfloat16 or float16, and both have these numbers.
        rules: Rules that are tried in order, per matrix.
        calibration: Text for methods that need it; None if no method does.
        scale_channels: Whether to scale channels of activations before their weights are calibrated, where
            that costs nothing and reduces the error (AWQ).
        allocation: Decides the schemes of linear layers that the rules quantize; None keeps the rules'
            schemes.
        regrid: Whether codes of the checkpoint are kept only in the bits and blocks that a rule states, and
            matrices are quantized again otherwise; by default codes are kept in their own.
    """

    accuracy_level: Literal[0, 1, 2, 3, 4]
    kept_accuracy: dict[Annotated[WeightRole, Field(strict=False)], Literal[0, 1, 2, 3, 4]] = Field(
        default_factory=dict
    )
    scales: Literal["activations", "float16", "bfloat16"] = "activations"
    rules: tuple[WeightRule, ...]
    calibration: CalibrationText | None = None
    scale_channels: bool = False
    allocation: Allocation | None = None
    regrid: bool = False

    @model_validator(mode="after")
    def _calibrated(self) -> "Quantization":
        schemes = [rule.scheme for rule in self.rules if rule.scheme is not None]
        schemes += self.allocation.choices if self.allocation is not None else ()
        if any(scheme.method.needs_calibration for scheme in schemes) != (self.calibration is not None):
            names = " or ".join(calibrated_methods())
            raise ValueError(f"give calibration if and only if a rule or choice has method {names}")
        if self.scale_channels and self.calibration is None:
            raise ValueError("scale_channels needs calibration")
        return self


class BackendName(StrEnum):
    """The kind of an artifact: an ONNX Runtime model, TensorRT engines, or a checkpoint for servers."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    CHECKPOINT = "checkpoint"


class Target(Strict):
    """The intent of a build: backend, passes in order, precision, interface, thresholds; `targets/*.yaml`.

    `quantize` belongs to the backends onnxruntime and checkpoint; `engine` to tensorrt and `checkpoint` to
    checkpoint, which need theirs.

    Args:
        kernels: `compiled` generates operators for the model and the profile's CPU, where possible.
        kv_cache: Element type of the KV cache, for `compiled` kernels and checkpoints only; otherwise it is
            `dtype`, or a choice of the server. A checkpoint has the scales of fp8, which the target's
            calibration text decides.
        prune: Parts to leave out of the model; parity is measured to the pruned model, quality to the
            original.
        lookup: Number of tokens that onnxruntime-genai drafts per step by prompt lookup, whoever serves the
            artifact. It then refuses batches, and needs logits of all tokens.
    """

    schema_version: Literal[1]
    name: str
    summary: str
    backend: Annotated[BackendName, Field(strict=False)]
    provider: Annotated[Provider, Field(strict=False)]
    dtype: Annotated[Dtype, Field(strict=False)]
    logits: Literal["last", "all"]
    kernels: Literal["onnxruntime", "compiled"] = "onnxruntime"
    kv_cache: Annotated[CacheType, Field(strict=False)] | None = None
    passes: tuple[PassSpec, ...]
    quantize: Quantization | None
    engine: Engine | None = None
    checkpoint: ServedCheckpoint | None = None
    prune: Pruning | None = None
    lookup: int | None = None
    gates: tuple[Gate, ...]

    @property
    def hardware(self) -> ProfileKind | None:
        """The kind of hardware that the artifact runs on; None for a checkpoint, which fits either."""
        if self.backend is BackendName.CHECKPOINT:
            return None
        return ProfileKind.GPU if self.provider is Provider.CUDA else ProfileKind.CPU

    @property
    def cache_text(self) -> CalibrationText | None:
        """The text that decides the scales of a KV cache in fp8; None for a target without such scales."""
        if self.kv_cache is not CacheType.FP8 or self.checkpoint is None:
            return None
        by_weights = None if self.quantize is None else self.quantize.calibration
        return self.checkpoint.calibration or by_weights

    @property
    def platform(self) -> tuple[str, str, str]:
        """What executes the artifact: targets that share it differ in passes, precision and gates."""
        kind = self.kernels if self.checkpoint is None else self.checkpoint.format.value
        return (self.backend.value, self.provider.value, kind)

    @model_validator(mode="after")
    def _backend_fits(self) -> "Target":
        if (self.backend is BackendName.TENSORRT) != (self.engine is not None):
            raise ValueError("engine requires backend tensorrt, and backend tensorrt requires engine")
        if self.backend is BackendName.TENSORRT and self.quantize is not None:
            raise ValueError("backend tensorrt takes its formats from engine.weights; quantize must be null")
        if self.backend is not BackendName.TENSORRT and self.prune is not None and self.prune.sparsity:
            raise ValueError(
                f"backend {self.backend.value} has no kernels for sparsity {self.prune.sparsity}"
            )
        if self.backend is not BackendName.TENSORRT and self.dtype is Dtype.BFLOAT16:
            raise ValueError("bfloat16 requires backend tensorrt; onnxruntime lacks kernels for it")
        compiled, served = self.kernels == "compiled", self.backend is BackendName.CHECKPOINT
        if self.kv_cache is not None and not compiled and not served:
            raise ValueError(
                "kv_cache requires kernels: compiled or backend checkpoint; otherwise its type is dtype"
            )
        if self.kv_cache is CacheType.FP8 and not served:
            raise ValueError("compiled kernels have a KV cache in float32, float16 or int8, not fp8")
        if self.kernels == "compiled" and (
            self.backend is not BackendName.ONNXRUNTIME or self.provider is not Provider.CPU
        ):
            raise ValueError("kernels: compiled requires backend onnxruntime and provider cpu")
        if self.backend is BackendName.TENSORRT and self.provider is not Provider.CUDA:
            raise ValueError("backend tensorrt needs provider cuda")
        if self.lookup is not None and (self.backend is not BackendName.ONNXRUNTIME or self.logits == "last"):
            raise ValueError("lookup requires backend onnxruntime and logits of all tokens")
        return self

    @model_validator(mode="after")
    def _checkpoint_fits(self) -> "Target":
        scales = None if self.quantize is None else self.quantize.scales
        if self.backend is not BackendName.CHECKPOINT:
            if self.checkpoint is not None:
                raise ValueError("checkpoint requires backend checkpoint")
            if scales == "bfloat16":
                raise ValueError("scales in bfloat16 require backend checkpoint")
            return self
        if self.checkpoint is None:
            raise ValueError("backend checkpoint requires a section checkpoint")
        if (self.quantize is not None) == bool(self.checkpoint.weights):
            raise ValueError("give exactly one of quantize and checkpoint.weights")
        if scales == "activations":
            raise ValueError("backend checkpoint requires scales bfloat16 or float16: servers have no others")
        if self.dtype is not Dtype.FLOAT32 or self.logits != "all":
            raise ValueError(
                "backend checkpoint requires dtype float32 and logits all; its floats keep their own type"
            )
        self._require_cache_scales(self.checkpoint)
        return self

    def _require_cache_scales(self, section: ServedCheckpoint) -> None:
        """Raise ValueError unless the format has the scales of the KV cache, and a text decides them."""
        if self.kv_cache is None:
            if section.calibration is not None and not section.quantizes_activations:
                raise ValueError("calibration is for rules that quantize activations, and for kv_cache")
            return
        if self.kv_cache is not CacheType.FP8:
            raise ValueError(
                f"servers have a KV cache in fp8 or in the type of activations, not in {self.kv_cache.value}"
            )
        if not section.format.has_cache_scales:
            raise ValueError(
                f"format {section.format.value} has no scales of a KV cache, which compressed-tensors and "
                "modelopt have"
            )
        if self.cache_text is None:
            raise ValueError("kv_cache: fp8 needs a calibration text: state checkpoint.calibration")


class BuildPlan(Strict):
    """The complete description of one build.

    Args:
        model: Model as the user wrote it: folder, hub id with optional @revision, GGUF file or `demo`.
        adapter: Folder or hub id of a LoRA adapter that is merged into the model; None for none.
        target: The target.
        profile: The hardware profile.
        also: Further hardware for the artifact; only engines are built for several.
        output: Directory of the artifact.
        verify: Whether to run the parity gate after building.
        eval_text: The text that the gate measures quality on.
        chat_template: Jinja template that replaces the checkpoint's own; None keeps it.
        token_ids: Whether to build although onnxruntime-genai's tokenizer does not give the model's tokens.
        every_check: Whether to measure everything although a cheap check of the gate has missed.
        seed: Seed of the positions that the gate verifies; None for the artifact's own.
        budget: Seconds of the forecast that decides how many positions are drawn; None for the default.
        shards: Ranks of tensor parallelism for which files are written beside the whole weights; None for
        none. shards_for: Whose names the tensors of ranks have: those of vLLM's own model, or of
        transformers'.
    """

    model: str
    adapter: str | None = None
    target: Target
    profile: Profile
    also: tuple[Profile, ...] = ()
    output: Path
    verify: bool = True
    eval_text: EvaluationText = Field(default_factory=shipped_text)
    chat_template: str | None = None
    token_ids: bool = False
    every_check: bool = False
    seed: int | None = None
    budget: float | None = None
    shards: Annotated[int, Field(ge=2)] | None = None
    shards_for: Literal["vllm", "transformers"] = "vllm"
