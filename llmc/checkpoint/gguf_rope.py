"""Read the rotary embedding of a GGUF file, and express it as transformers parameters with the same numbers.

Source of the formulas: `rope_yarn` of ggml and `llama_context` of llama.cpp. The angle of pair i at position
p is p * f[i]; cosine and sine are multiplied by one factor. f[i] is base^(-2i/n), divided by the tensor
`rope_freqs.weight` (or `rope_factors_short.weight` / `rope_factors_long.weight`) and scaled according to the
`rope.scaling.*` keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.arrays import Array
from llmc.checkpoint.gguf_header import GgufHeader, GgufTensor
from llmc.checkpoint.ranges import read_range
from llmc.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FREQUENCY_TENSOR = "rope_freqs.weight"
SHORT_TENSOR = "rope_factors_short.weight"
LONG_TENSOR = "rope_factors_long.weight"
ROPE_TENSORS = frozenset({FREQUENCY_TENSOR, SHORT_TENSOR, LONG_TENSOR})

_TYPES = ("none", "linear", "yarn", "longrope")
_READ = frozenset(
    {
        "freq_base",
        "freq_base_swa",
        "dimension_count",
        "dimension_count_swa",
        "scale_linear",
        "scaling.type",
        "scaling.factor",
        "scaling.original_context_length",
        "scaling.attn_factor",
        "scaling.finetuned",
        "scaling.yarn_log_multiplier",
        "scaling.yarn_ext_factor",
        "scaling.yarn_beta_fast",
        "scaling.yarn_beta_slow",
    }
)
_NEUTRAL = {"scaling.alpha": 0.0, "scaling.yarn_attn_factor": 1.0}
_LLAMA3_CONTEXT = 8192  # context that the factors were made for; only its ratios to the bounds matter
_EXACT = 1e-6  # relative; the factors are stored in float32
_EQUAL = 1e-5  # relative; frequencies are computed in float32 by the model
_SLIDING = "sliding_attention"


@dataclass(frozen=True)
class GgufRotary:
    """A rotary embedding with llama.cpp's parameters.

    Args:
        base: Theta, the base of the frequencies.
        dimensions: Number of rotated elements of a head, twice the number of frequencies.
        scale: Factor on positions where frequencies are interpolated; 1 / factor.
        extrapolation: Weight of YaRN's ramp; 0 without YaRN.
        beta_fast: Rotations over the original context above which YaRN leaves a frequency alone.
        beta_slow: Rotations below which it is interpolated in full.
        context: Length that the model was trained for before extension, in tokens.
        attention: Factor on cosine and sine.
        short: Divisors of the frequencies up to `context` tokens, (dimensions / 2); None if all are 1.
        long: Divisors of the frequencies beyond `context`; None if they equal `short`.
    """

    base: float
    dimensions: int
    scale: float = 1.0
    extrapolation: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    context: int = 0
    attention: float = 1.0
    short: Array | None = None
    long: Array | None = None

    def plain(self) -> Array:
        """Compute the frequencies before any scaling, (dimensions / 2), float64."""
        return self.base ** (-np.arange(0, self.dimensions, 2, dtype=np.float64) / self.dimensions)

    def frequencies(self, *, long: bool = False) -> Array:
        """Compute the frequencies in the short or the long range, (dimensions / 2), float64."""
        divisors = self.long if long and self.long is not None else self.short
        free = self.plain() if divisors is None else self.plain() / divisors
        if self.extrapolation == 0.0:
            return free * self.scale
        mix = self._ramp() * self.extrapolation
        return free * self.scale * (1 - mix) + free * mix

    def _ramp(self) -> Array:
        def pair(rotations: float) -> float:
            ratio = self.context / (rotations * 2 * math.pi)
            return self.dimensions * math.log(ratio) / (2 * math.log(self.base))

        low = max(0, math.floor(pair(self.beta_fast)))
        high = min(self.dimensions - 1, math.ceil(pair(self.beta_slow)))
        steps = (np.arange(self.dimensions // 2) - low) / max(0.001, high - low)
        return np.asarray(1 - np.clip(steps, 0, 1))

    def parameters(self, positions: int) -> dict[str, Any]:
        """Return `rope_parameters` of transformers that give these numbers.

        Args:
            positions: Longest context of the model, in tokens.
        """
        theta = {"rope_theta": self.base}
        if self.long is not None:
            return theta | self._switched(positions)
        if self.short is not None:
            return theta | (self._llama3() or self._fixed(positions))
        if self.extrapolation not in (0.0, 1.0) or (self.extrapolation == 0.0 and self.attention != 1.0):
            return theta | self._fixed(positions)
        if self.extrapolation == 1.0:
            return theta | self._yarn()
        if self.scale != 1.0:
            return theta | {"rope_type": "linear", "factor": 1 / self.scale}
        return theta | {"rope_type": "default"}

    def _yarn(self) -> dict[str, Any]:
        return {
            "rope_type": "yarn",
            "factor": 1 / self.scale,
            "original_max_position_embeddings": self.context,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "attention_factor": self.attention,
        }

    def _switched(self, positions: int) -> dict[str, Any]:
        short, long = self.frequencies(), self.frequencies(long=True)
        return {
            "rope_type": "longrope",
            "factor": max(1.0, positions / self.context),
            "short_factor": (self.plain() / short).tolist(),
            "long_factor": (self.plain() / long).tolist(),
            "original_max_position_embeddings": self.context,
            "attention_factor": self.attention,
        }

    def _fixed(self, positions: int) -> dict[str, Any]:
        """Express any frequencies as LongRoPE whose two lists are equal and whose switch is never reached."""
        divisors = (self.plain() / self.frequencies()).tolist()
        return {
            "rope_type": "longrope",
            "factor": 1.0,
            "short_factor": divisors,
            "long_factor": divisors,
            "original_max_position_embeddings": positions,
            "attention_factor": self.attention,
        }

    def _llama3(self) -> dict[str, Any] | None:
        """Return the Llama 3.1 parameters that reproduce `short`; None if no parameters do.

        Between the bounds, (1/divisor - 1/factor) / (1 - 1/factor) is linear in the frequency.
        """
        if self.short is None or self.scale != 1.0 or self.extrapolation or self.attention != 1.0:
            return None
        divisors, turns = np.asarray(self.short, np.float64), self.plain() / (2 * math.pi)
        factor = float(divisors[-1])
        between = (divisors > 1 + _EQUAL) & (divisors < factor * (1 - _EQUAL))
        if factor <= 1 or between.sum() < 2:
            return None
        smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(turns[between], smooth, 1)
        if slope <= 0:
            return None
        context = self.context or _LLAMA3_CONTEXT
        width = context / slope
        low, high = _rounded(-start * width), _rounded((1 - start) * width)
        reproduced = _llama3_divisors(turns, factor, low, high, context)
        if low >= high or not np.allclose(reproduced, divisors, rtol=_EXACT, atol=0):
            return None
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }


def read_rotary(header: GgufHeader) -> GgufRotary:
    """Read the rotary embedding of the model; if layers differ, the embedding of its global layers.

    Raises:
        CheckpointError: A tensor of factors does not fit.
        UnsupportedError: A key or a kind of scaling is not supported.
    """
    _refuse_unknown(header)
    heads = header.value("attention.head_count")
    width = header.value("embedding_length")
    if isinstance(heads, list):
        heads = max(heads)
    head = header.value("attention.key_length") or (width // heads if heads and width else 0)
    dimensions = header.value("rope.dimension_count") or head
    kind = header.value("rope.scaling.type") or "linear"
    factor = header.value("rope.scaling.factor") or header.value("rope.scale_linear") or 1.0
    if kind not in _TYPES:
        raise UnsupportedError(
            f"{header.files[0]} has {header.architecture}.rope.scaling.type = {kind}, "
            f"but llama.cpp has {', '.join(_TYPES)}",
            hint="compile the original Hugging Face checkpoint instead",
        )
    context = header.value("rope.scaling.original_context_length") or header.value("context_length") or 0
    if factor <= 0 or dimensions < 2 or (kind == "yarn" and context < 1):
        raise CheckpointError(
            f"{header.files[0]} has a rotary embedding of {dimensions} dimensions, "
            f"scaled by a factor of {factor} from a context of {context} tokens",
            hint="convert the original model again",
        )
    extrapolation = header.value("rope.scaling.yarn_ext_factor")
    if extrapolation is None or extrapolation < 0:
        extrapolation = 1.0 if kind == "yarn" else 0.0
    divisors = {name: _divisors(header, name, dimensions) for name in ROPE_TENSORS}
    _check_divisors(header, kind, factor, divisors)
    rotary = GgufRotary(
        base=header.value("rope.freq_base") or 10000.0,
        dimensions=dimensions,
        scale=1.0 if kind == "none" else 1 / factor,
        extrapolation=extrapolation,
        beta_fast=header.value("rope.scaling.yarn_beta_fast") or 32.0,
        beta_slow=header.value("rope.scaling.yarn_beta_slow") or 1.0,
        context=context,
        attention=header.value("rope.scaling.attn_factor") or 1.0,
        short=divisors[FREQUENCY_TENSOR] if divisors[SHORT_TENSOR] is None else divisors[SHORT_TENSOR],
        long=divisors[LONG_TENSOR],
    )
    if not extrapolation:
        return rotary
    multiplier = header.value("rope.scaling.yarn_log_multiplier") or 0.0
    yarn_factor = _mscale(factor, 1.0) / (_mscale(factor, multiplier) if multiplier else 1.0)
    return replace(rotary, attention=rotary.attention * yarn_factor)


def rope_parameters(header: GgufHeader, config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return `rope_parameters` for `config` as the file states; None for a model without rotary embeddings.

    Raises:
        UnsupportedError: The file states a scaling that the model does not have or cannot have.
    """
    rotary = read_rotary(header)
    current: Mapping[str, Any] | None = getattr(config, "rope_parameters", None)
    if not current:
        if not np.array_equal(rotary.plain(), rotary.frequencies()) or rotary.long is not None:
            raise _not_taken(header, config.model_type)
        return None
    positions = config.max_position_embeddings
    if not _labels(current):
        _refuse_second_base(header, rotary)
        return _merge(current, rotary, header, positions)
    return {
        label: _merge(current[label], _of_layers(label, rotary, header), header, positions)
        for label in _labels(current)
    }


def _labels(parameters: Mapping[str, Any]) -> list[str]:
    """Return the kinds of layers that have their own parameters; none if all layers share them."""
    return [key for key, value in parameters.items() if isinstance(value, dict)]


def _of_layers(label: str, rotary: GgufRotary, header: GgufHeader) -> GgufRotary:
    """Return the embedding of a kind of layers: llama.cpp scales only global layers."""
    if label != _SLIDING:
        return rotary
    return GgufRotary(base=header.value("rope.freq_base_swa") or 10000.0, dimensions=rotary.dimensions)


def check_rotary(header: GgufHeader, model: PreTrainedModel) -> None:
    """Compare the frequencies that the model computes with the frequencies in the file.

    Raises:
        UnsupportedError: They differ, so the model's class does not apply what the file states.
    """
    import torch

    parameters = getattr(model.config, "rope_parameters", None)
    if not parameters:
        return
    rotary = read_rotary(header)
    used = [label for label in _labels(parameters) if label in (model.config.layer_types or ())]
    for kind in {type(m) for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")}:
        with torch.device("cpu"):
            module: Any = kind(config=model.config)
        for label in used or [""]:
            prefix = f"{label}_" if label else ""
            actual = getattr(module, f"{prefix}inv_freq", None)
            scaling = getattr(module, f"{prefix}attention_scaling", 1.0)
            expected = _of_layers(label, rotary, header)
            if (
                actual is None
                or actual.shape != (expected.dimensions // 2,)
                or not np.allclose(actual.double().numpy(), expected.frequencies(), rtol=_EQUAL, atol=0)
                or not math.isclose(scaling, expected.attention, rel_tol=_EQUAL)
            ):
                raise _not_taken(header, model.config.model_type)


def _merge(
    current: Mapping[str, Any], rotary: GgufRotary, header: GgufHeader, positions: int
) -> dict[str, Any]:
    """Replace the config's parameters by the file's; keep the sections of several axes."""
    merged = {key: value for key, value in current.items() if key.startswith("mrope_")}
    head = header.value("attention.key_length") or header.value("embedding_length") // header.value(
        "attention.head_count"
    )
    if rotary.dimensions != head or "partial_rotary_factor" in current:
        merged["partial_rotary_factor"] = rotary.dimensions / head
    return merged | rotary.parameters(positions)


def _refuse_unknown(header: GgufHeader) -> None:
    prefix = f"{header.architecture}.rope."
    for key, value in header.metadata.items():
        if not key.startswith(prefix):
            continue
        suffix = key.removeprefix(prefix)
        sections = suffix == "dimension_sections" and isinstance(value, list)
        if sections and (not any(value) or header.architecture.startswith("qwen35")):
            continue
        if suffix not in _READ and value != _NEUTRAL.get(suffix):
            raise UnsupportedError(
                f"{header.files[0]} has {key} = {value}, which llmc does not know how to apply",
                hint="compile the original Hugging Face checkpoint instead",
            )
    if header.value("rope.dimension_count_swa") not in (None, header.value("rope.dimension_count")):
        raise UnsupportedError(
            f"{header.files[0]} rotates other dimensions in its sliding layers "
            f"({prefix}dimension_count_swa = {header.value('rope.dimension_count_swa')})",
            hint="compile the original Hugging Face checkpoint instead",
        )


def _refuse_second_base(header: GgufHeader, rotary: GgufRotary) -> None:
    local = header.value("rope.freq_base_swa")
    if local not in (None, rotary.base):
        raise UnsupportedError(
            f"{header.files[0]} has {header.architecture}.rope.freq_base_swa = {local} but a base of "
            f"{rotary.base}, and this model of transformers has one base",
            hint="compile the original Hugging Face checkpoint instead",
        )


def _divisors(header: GgufHeader, name: str, dimensions: int) -> Array | None:
    tensor = next((t for t in header.tensors if t.name == name), None)
    if tensor is None:
        return None
    values = _read(tensor)
    if values.shape != (dimensions // 2,) or not np.all(np.isfinite(values)) or np.any(values <= 0):
        raise CheckpointError(
            f"{name} in {tensor.file} has shape {list(values.shape)}; "
            f"{dimensions} rotated dimensions have {dimensions // 2} positive factors",
            hint="the file's metadata and tensors must belong to the same model",
        )
    return values.astype(np.float64)


def _read(tensor: GgufTensor) -> Array:
    from gguf import GGMLQuantizationType, quants

    rows = tensor.shape[0] if tensor.shape else 1
    raw = read_range(tensor.file, tensor.offset, np.dtype(np.uint8), (rows, tensor.row_bytes), 0, None)
    values: Array = quants.dequantize(raw, GGMLQuantizationType(tensor.type_id))
    return values.reshape(tensor.shape)


def _check_divisors(
    header: GgufHeader, kind: str, factor: float, divisors: Mapping[str, Array | None]
) -> None:
    short, long = divisors[SHORT_TENSOR], divisors[LONG_TENSOR]
    stated = f"{header.architecture}.rope.scaling"
    if (short is None) != (long is None) or (kind == "longrope" and long is None):
        raise CheckpointError(
            f"{header.files[0]} uses LongRoPE but does not have both {SHORT_TENSOR} and {LONG_TENSOR}",
            hint="convert the original model again with a current llama.cpp",
        )
    if long is not None and (kind == "yarn" or factor != 1.0 or divisors[FREQUENCY_TENSOR] is not None):
        raise UnsupportedError(
            f"{header.files[0]} has LongRoPE's factors and {stated}.type = {kind}, "
            f"{stated}.factor = {factor}; llama.cpp would scale twice, but the original model does not",
            hint="compile the original Hugging Face checkpoint instead",
        )


def _not_taken(header: GgufHeader, model_type: str) -> UnsupportedError:
    stated = [key for key in header.metadata if key.startswith(f"{header.architecture}.rope.")]
    tensors = [t.name for t in header.tensors if t.name in ROPE_TENSORS]
    return UnsupportedError(
        f"{header.files[0]} states its rotary embedding by {', '.join([*stated, *tensors])}, "
        f"but the {model_type} model of transformers computes other frequencies",
        hint="compile the original Hugging Face checkpoint instead",
    )


def _mscale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _rounded(value: float) -> float:
    """Return the nearest quarter if the value differs from it only by the rounding of the stored factors."""
    near = round(value * 4) / 4
    return near if abs(value - near) < 1e-3 * max(1.0, near) else value


def _llama3_divisors(turns: Array, factor: float, low: float, high: float, context: int) -> Array:
    smooth = np.clip((context * turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))
