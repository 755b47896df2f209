"""Read adapter_config.json of a LoRA adapter, in the layout of peft (https://huggingface.co/docs/peft).

Fields that only say how the adapter was trained are not read. A field that changes what the adapter computes
is either merged or refused by name; an unknown field is refused too, since it may change numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.checkpoint.fields import read_fields
from llmc.errors import CheckpointError, UnsupportedError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

_MERGE = "merge it with peft (merge_and_unload, save_pretrained) and build the merged model"
#: Value of `target_modules` for every linear layer except the head.
ALL_LINEAR = "all-linear"
#: Fields that are read.
_READ = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
    }
    | {"use_rslora", "use_dora", "target_modules", "exclude_modules", "target_parameters", "modules_to_save"}
    | {"layers_to_transform", "layers_pattern", "trainable_token_indices", "ensure_weight_tying"}
    | {"init_lora_weights"}
)
#: Fields about training, or fields whose content the tensors and the base's modules repeat.
_NEUTRAL = frozenset(
    {"auto_mapping", "inference_mode", "lora_dropout", "fan_in_fan_out", "bias", "peft_version"}
    | {"runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"}
    | {"megatron_config", "megatron_core", "qalora_group_size", "lora_bias", "_custom_modules"}
)
#: Initializations that do not change the base's weights.
_PLAIN_INIT = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True)
class LoraConfig:
    """The content of adapter_config.json.

    Args:
        base: Model that the adapter was trained on, as its trainer named it; None if the config names none.
        revision: That model's revision.
        rank: Number of rows of A, unless `ranks` has another number.
        alpha: Numerator of the scale, unless `alphas` has another number.
        ranks: Rank by regular expression over the ends of module names.
        alphas: Alpha by regular expression over the ends of module names.
        rslora: Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        dora: Whether merged weights get the norms that the adapter stores.
        targets: Ends of module names, or one regular expression over whole names.
        excluded: Modules that are not adapted although `targets` names them, in the same forms.
        layers: Indices of the adapted layers; None for all.
        layer_lists: Names of the lists in which `layers` counts; empty for any list.
        parameters: Ends of names of parameters that are adapted individually, such as stacked experts.
        saved: Modules that are stored whole.
        tokens: Indices of stored rows by the embedding's name; "" stands for the input embedding.
        tie: Whether a change to one of two tied matrices applies to both.
    """

    base: str | None
    revision: str | None
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...] | None
    layer_lists: tuple[str, ...]
    parameters: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    tie: bool

    def rank_of(self, module: str) -> int:
        """Return the rank of a module by its full name."""
        return int(_pattern_value(self.ranks, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """Return the alpha of a module by its full name."""
        return float(_pattern_value(self.alphas, module, self.alpha))

    def scale_of(self, module: str) -> float:
        """Return the factor on B @ A."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    def adapts(self, module: str) -> bool:
        """Return whether the fields say that this module has its own matrices."""
        if _names(self.excluded, module) or any(
            re.match(rf"(^|.*\.){m}($|\..*)", module) for m in self.saved
        ):
            return False
        if self.targets == ALL_LINEAR:
            return True
        if not _names(self.targets, module):
            return False
        if self.layers is None or isinstance(self.targets, str) or module in self.targets:
            return True
        layer = next(filter(None, (re.match(p, module) for p in self._layer_patterns())), None)
        return layer is not None and int(layer["index"]) in self.layers

    def _layer_patterns(self) -> Iterable[str]:
        if not self.layer_lists:
            return (r".*?\.[^.]*\.(?P<index>\d+)\.",)
        return (rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in self.layer_lists)


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json of `folder`.

    Raises:
        CheckpointError: The file is missing or damaged.
        UnsupportedError: The adapter is not a LoRA adapter, or uses features that are not supported.
    """
    file = folder / CONFIG
    fields = _read_fields(file)
    kind = fields.get("peft_type")
    if kind != "LORA":
        description = f"of kind {kind}" if kind else "not in peft's layout: it has no peft_type"
        raise UnsupportedError(f"the adapter {folder} is {description}; only LORA is supported", hint=_MERGE)
    task = fields.get("task_type")
    if task not in (None, "", "CAUSAL_LM"):
        raise UnsupportedError(
            f"the adapter {folder} was trained for {task}, but llmc builds causal language models",
            hint="use an adapter with the task_type CAUSAL_LM",
        )
    _refuse_unknown(fields, folder)
    try:
        return _parse(fields)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{file} is damaged: {type(error).__name__}: {error}", hint="save the adapter again with peft"
        ) from error


def base_of(folder: Path) -> str | None:
    """Return the model that the adapter in `folder` names as its base; None if it names none."""
    base = _read_fields(folder / CONFIG).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _read_fields(file: Path) -> dict[str, Any]:
    if not file.is_file():
        inside = sorted(file.parent.glob(f"*/{CONFIG}"))
        raise CheckpointError(
            f"{file.parent} is not an adapter: it has no {CONFIG}",
            hint=f"give {inside[0].parent}"
            if inside
            else "give the folder that peft's save_pretrained wrote",
        )
    return read_fields(file)


def _refuse_unknown(fields: Mapping[str, Any], folder: Path) -> None:
    used = sorted(k for k, v in fields.items() if v and k not in _READ and k not in _NEUTRAL)
    if used:
        raise UnsupportedError(
            f"the adapter {folder} uses {', '.join(used)}, which llmc cannot merge", hint=_MERGE
        )
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init not in _PLAIN_INIT:
        raise UnsupportedError(
            f"the adapter {folder} was initialized by {init}, which also changes the base's weights",
            hint="save it with path_initial_model_for_weight_conversion, or " + _MERGE,
        )


def _parse(fields: Mapping[str, Any]) -> LoraConfig:
    rank, alpha = int(fields.get("r", 8)), float(fields.get("lora_alpha", 8))
    ranks = {str(k): int(v) for k, v in (fields.get("rank_pattern") or {}).items()}
    if min([rank, *ranks.values()]) < 1:
        raise ValueError(f"rank {min([rank, *ranks.values()])}")
    layers = fields.get("layers_to_transform")
    if layers is not None:
        layers = (layers,) if isinstance(layers, int) else tuple(map(int, layers)) or None
    tokens = fields.get("trainable_token_indices") or {}
    tokens = tokens if isinstance(tokens, dict) else {"": tokens}
    return LoraConfig(
        base=fields.get("base_model_name_or_path"),
        revision=fields.get("revision"),
        rank=rank,
        alpha=alpha,
        ranks=ranks,
        alphas={str(k): float(v) for k, v in (fields.get("alpha_pattern") or {}).items()},
        rslora=bool(fields.get("use_rslora")),
        dora=bool(fields.get("use_dora")),
        targets=_names_of(fields.get("target_modules")),
        excluded=_names_of(fields.get("exclude_modules")),
        layers=layers,
        layer_lists=_list_of(fields.get("layers_pattern")),
        parameters=_list_of(fields.get("target_parameters")),
        saved=_list_of(fields.get("modules_to_save")),
        tokens={str(k): tuple(map(int, v)) for k, v in tokens.items()},
        tie=bool(fields.get("ensure_weight_tying")),
    )


def _names_of(value: Any) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else _list_of(value)


def _list_of(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(map(str, value or ()))


def _names(patterns: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(patterns, str):
        return bool(patterns) and re.fullmatch(patterns, module) is not None
    return any(module == each or module.endswith(f".{each}") for each in patterns)


def _pattern_value(patterns: Mapping[str, float], module: str, usual: float) -> float:
    key = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", module)), None)
    return usual if key is None else patterns[key]
