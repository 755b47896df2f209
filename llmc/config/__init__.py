"""What a build is asked to do: `Target` (intent) and `BuildPlan`; facts on hardware are `llmc.profile`'s.

All are strict and frozen, and come from YAML through `llmc.catalog`; `model_copy` makes a variant.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmc.config.base import CalibrationText as CalibrationText
from llmc.config.base import Rule as Rule
from llmc.config.base import Scheme as Scheme
from llmc.config.base import WeightRole as WeightRole
from llmc.config.engine import Engine as Engine
from llmc.config.engine import EngineRule as EngineRule
from llmc.config.engine import EngineScheme as EngineScheme
from llmc.config.engine import Span as Span
from llmc.config.engine import WeightFormat as WeightFormat
from llmc.config.method import METHODS as METHODS
from llmc.config.method import LeastSquares as LeastSquares
from llmc.config.method import Method as Method
from llmc.config.method import NamedMethod, calibrated_methods
from llmc.config.metrics import Better as Better
from llmc.config.metrics import Family as Family
from llmc.config.metrics import Metric as Metric
from llmc.profile import Profile, ProfileKind
from llmc.records import Strict


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


class Gate(Strict):
    """One threshold on one metric, with the reason for its value.

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
    """One pass of a target, and how often it must apply.

    Args:
        name: Registered name of the pass.
        per_layer: Times that it must apply per decoder layer, or [least, most]; accepted refusals count.
        accept: Codes of refusals that are fine on this target; any other refusal fails the build.
    """

    name: str
    per_layer: int | tuple[int, int] | None = None
    accept: tuple[str, ...] = ()


class WeightScheme(Strict):
    """How one matrix is stored: integers by block along the input features.

    Args:
        bits: 4 or 8.
        block_size: Input features that share a scale.
        symmetric: True for a fixed zero point of 2**(bits-1), False for one per block.
        method: How the codes are found; see `llmc.config.method`.
    """

    bits: Literal[4, 8]
    block_size: Literal[16, 32, 64, 128]
    symmetric: bool
    method: NamedMethod


WeightRule = Rule[WeightScheme]


class NeuronPruning(Strict):
    """Neurons of every MLP that are left out.

    Args:
        fraction: Of the neurons of a layer.
        multiple: The nearest multiple of this stays: blocks of quantized weights and kernels want it.
    """

    fraction: Annotated[float, Field(gt=0, lt=1)]
    multiple: Annotated[int, Field(ge=1)]


class Pruning(Strict):
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


class Allocation(Strict):
    """Mixed precision: how many bits each matrix gets, solved from how much the model's answers need them.

    Args:
        choices: Schemes that a matrix can get; that of its rule is one more.
        text: Calibration text that sensitivities are measured on.
        budget_bits: Most stored bits by element over all matrices of the model, scales and zero points
            included; within it the least predicted KL divergence is sought. Not with `max_kl`.
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


class Quantization(Strict):
    """Weight-only quantization of a target.

    Args:
        accuracy_level: `MatMulNBits` attribute: 0 unset, 1 fp32, 2 fp16 (kernels: int16), 4 int8 activations.
        kept_accuracy: The same, by role, for codes kept from the checkpoint, which lose nothing else.
        scales: Type that scales are stored in: that of the `activations`, as operators take them, or
            `float16`, made float32 when a session starts. Experts have the former; scales that a checkpoint
            has in float16 stay so where its codes are kept.
        rules: Tried in order, per matrix.
        calibration: Text for methods that need it; None if nothing has such a method.
        scale_channels: Scale channels of activations before their weights are calibrated, where that costs
            nothing and helps (AWQ).
        allocation: Decides anew on linear layers that the rules quantize; None leaves it at the rules.
    """

    accuracy_level: Literal[0, 1, 2, 3, 4]
    kept_accuracy: dict[Annotated[WeightRole, Field(strict=False)], Literal[0, 1, 2, 3, 4]] = Field(
        default_factory=dict
    )
    scales: Literal["activations", "float16"] = "activations"
    rules: tuple[WeightRule, ...]
    calibration: CalibrationText | None = None
    scale_channels: bool = False
    allocation: Allocation | None = None

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
    """What an artifact is made of: an ONNX Runtime model, or TensorRT engines."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"


class Target(Strict):
    """An intent: backend, passes in order, precision, interface, thresholds. `targets/*.yaml`.

    `quantize` belongs to the backend onnxruntime; `engine` to tensorrt, which needs it.

    Args:
        kernels: `compiled` generates operators for the model and the profile's CPU, where they fit.
        kv_cache: Element type of the KV cache, for `compiled` kernels alone; elsewhere it is `dtype`.
        prune: What is left out of the model; parity is to the model without it, quality to the original.
        lookup: Tokens that onnxruntime-genai drafts in a step by prompt lookup, whoever serves the
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
    prune: Pruning | None = None
    lookup: int | None = None
    gates: tuple[Gate, ...]

    @property
    def hardware(self) -> ProfileKind:
        """The kind of hardware that the artifact runs on."""
        return ProfileKind.GPU if self.provider is Provider.CUDA else ProfileKind.CPU

    @property
    def platform(self) -> tuple[str, str, str]:
        """What executes the artifact: targets that share it differ in passes, precision and gates."""
        return (self.backend.value, self.provider.value, self.kernels)

    @model_validator(mode="after")
    def _backend_fits(self) -> "Target":
        if (self.backend is BackendName.TENSORRT) != (self.engine is not None):
            raise ValueError("engine goes with backend tensorrt, which needs it, and with no other backend")
        if self.backend is BackendName.TENSORRT and self.quantize is not None:
            raise ValueError("backend tensorrt takes its formats from engine.weights; quantize must be null")
        if self.backend is not BackendName.TENSORRT and self.prune is not None and self.prune.sparsity:
            raise ValueError(
                f"backend {self.backend.value} has no kernels for sparsity {self.prune.sparsity}"
            )
        if self.backend is not BackendName.TENSORRT and self.dtype is Dtype.BFLOAT16:
            raise ValueError("bfloat16 goes with backend tensorrt; onnxruntime lacks kernels for it")
        if self.kv_cache is not None and self.kernels != "compiled":
            raise ValueError("kv_cache goes with kernels: compiled; elsewhere it is of the type dtype")
        if self.backend is BackendName.TENSORRT and self.provider is not Provider.CUDA:
            raise ValueError("backend tensorrt needs provider cuda")
        if self.lookup is not None and (self.backend is BackendName.TENSORRT or self.logits == "last"):
            raise ValueError("lookup goes with backend onnxruntime and logits of all tokens")
        return self


class BuildPlan(Strict):
    """One build, fully resolved.

    Args:
        model: As the user wrote it: folder, hub id with optional @revision, GGUF file or `demo`.
        adapter: Folder or hub id of a LoRA adapter that is merged into the model; None for none.
        target: The intent.
        profile: The hardware.
        also: Further hardware that the artifact is to run on; engines alone are built for several.
        output: Directory of the artifact.
        verify: Run the parity gate after building.
        eval_text: Files of evaluation text, `-` for standard input; none for the one that ships.
        chat_template: Jinja template in the place of the checkpoint's own; None for that.
        token_ids: Build although onnxruntime-genai's tokenizer does not give the model's tokens.
        every_check: Measure everything although a cheap check of the gate has missed.
        seed: By which the positions that the gate looks at are drawn; None for the artifact's own.
        budget: Seconds of the forecast that decides how many are drawn; None for the usual.
    """

    model: str
    adapter: str | None = None
    target: Target
    profile: Profile
    also: tuple[Profile, ...] = ()
    output: Path
    verify: bool = True
    eval_text: tuple[str, ...] = ()
    chat_template: str | None = None
    token_ids: bool = False
    every_check: bool = False
    seed: int | None = None
    budget: float | None = None
