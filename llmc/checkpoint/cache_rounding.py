"""Round what a model stores in its KV cache as the scales of a folder say: to E4M3 times a scale.

A server keeps `round_to_E4M3(x / scale)` of keys and values, within the largest number of E4M3, and attends
to it times the scale. transformers 5.24.0 has the scales of compressed-tensors 0.19.0 as parameters and does
not execute them: its models name the cache `cache`, and the library looks for `past_key_values`. This repeats
the servers' arithmetic in float32, for both formats that have scales.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.architecture import watch_cache
from llmc.checkpoint.quantization import QuantMethod
from llmc.checkpoint.safetensors import SafetensorsStore

if TYPE_CHECKING:
    import torch

    from llmc.checkpoint.checkpoint import Checkpoint

#: Largest number of E4M3.
_MOST = 448.0
#: The names of the scales of keys and values, behind that of the attention module.
_NAMES = {
    QuantMethod.COMPRESSED_TENSORS: (".k_scale", ".v_scale"),
    QuantMethod.MODELOPT: (".k_proj.k_scale", ".v_proj.v_scale"),
}


@dataclass
class CacheRounding:
    """The rounding of a model's KV cache, and what it has seen.

    Args:
        scales: Scales of keys and of values, by the number of the layer.
        problems: Scales that the folder lacks, a sentence each.
        peaks: Largest magnitudes of keys and of values so far, before rounding, by the number of the layer.
    """

    scales: Mapping[int, tuple[float, float]]
    problems: tuple[str, ...] = ()
    peaks: dict[int, tuple[float, float]] = field(default_factory=dict)

    def round(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values (batch, heads, sequence, width) that a server reads back.

        A layer without scales has 1, as servers do.
        """
        import torch

        seen = self.peaks.get(layer, (0.0, 0.0))
        found = [float(each.abs().max()) if each.numel() else 0.0 for each in (keys, values)]
        self.peaks[layer] = (max(seen[0], found[0]), max(seen[1], found[1]))
        first, second = (
            (each / scale).clamp(-_MOST, _MOST).to(torch.float8_e4m3fn).to(each.dtype) * scale
            for each, scale in zip((keys, values), self.scales.get(layer, (1.0, 1.0)), strict=True)
        )
        return first, second

    def ratios(self) -> dict[str, float]:
        """Return how far each scale is from the one that spans what was seen, as a factor of 1 or more."""
        found = {}
        for layer, peaks in sorted(self.peaks.items()):
            pairs = zip(("keys", "values"), peaks, self.scales.get(layer, (1.0, 1.0)), strict=True)
            for kind, peak, scale in pairs:
                ratio = _MOST * scale / peak if peak else 1.0
                found[f"{kind} of layer {layer}"] = max(ratio, 1 / ratio)
        return found


def round_cache(model: Any, checkpoint: Checkpoint) -> CacheRounding | None:
    """Let `model` round keys and values as the folder of `checkpoint` declares.

    Returns:
        The rounding; None if the folder declares none.
    """
    file = checkpoint.path / "config.json"
    declared = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
    quantization = checkpoint.quantization
    if quantization is None or quantization.method not in _NAMES or not declared.get("kv_cache_scheme"):
        return None
    rounding = _read(model, checkpoint, _NAMES[quantization.method])

    def before(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        from transformers import DynamicCache

        cache = named.get("cache")
        if cache is None:
            cache = DynamicCache(config=model.config)
        if not hasattr(cache, "llmc_rounds"):
            watch_cache(cache, rounding.round).llmc_rounds = True
        return args, {**named, "cache": cache}

    model.register_forward_pre_hook(before, with_kwargs=True)
    return rounding


def read_cache_scales(folder: Path) -> dict[int, tuple[float, float]]:
    """Return the scales of keys and of values that the files of a folder have, by layer; 1 for one of a pair
    that they lack.

    The number of the layer is the last in the name of its attention module.
    """
    stored = SafetensorsStore.open(folder)
    found: dict[int, list[float]] = {}
    for name in stored.infos():
        kind, layer = name.rpartition(".")[2], re.findall(r"\d+", name)
        if kind in ("k_scale", "v_scale") and layer:
            value = float(np.asarray(stored.read(name), np.float32).reshape(-1)[0])
            found.setdefault(int(layer[-1]), [1.0, 1.0])[kind == "v_scale"] = value
    return {layer: (keys, values) for layer, (keys, values) in found.items()}


def _read(model: Any, checkpoint: Checkpoint, names: tuple[str, str]) -> CacheRounding:
    """Read the scales of each layer; one that is missing is a problem, and 1 as servers have it."""
    stored = SafetensorsStore.open(checkpoint.path)
    found: dict[int, tuple[float, float]] = {}
    problems = []
    kinds = set()
    for path, module in _attention(checkpoint, stored, names, model):
        values = []
        for name in (path + end for end in names):
            is_there = name in stored.infos()
            problems += [] if is_there else [f"the folder has no {name}, for which servers take 1"]
            array = np.asarray(stored.read(name), np.float32) if is_there else np.ones(1, np.float32)
            values.append(float(array.reshape(-1)[0]))
        found[int(module.layer_idx)] = (values[0], values[1])
        kinds.add(type(module))
    alike = [each for each in model.modules() if type(each) in kinds]
    without = sorted({int(each.layer_idx) for each in alike} - found.keys())
    problems += [f"the folder has no scales of the KV cache of layer {n}" for n in without]
    if not found:
        problems.append("the folder declares a KV cache in fp8 and has no scales of it")
    return CacheRounding(found, tuple(problems))


def _attention(
    checkpoint: Checkpoint, stored: SafetensorsStore, names: tuple[str, str], model: Any
) -> Iterator[tuple[str, Any]]:
    """Yield the attention modules that have scales: their names in the files, and the modules."""
    parts = checkpoint.file_tensors().parts
    endings = [(path, end) for path in stored.infos() for end in names if path.endswith(end)]
    for path in dict.fromkeys(path.removesuffix(end) for path, end in endings):
        for name, part in parts.items():
            tail = name[len(path) :]
            if name.startswith(f"{path}.") and part.parameter.endswith(tail):
                yield path, model.get_submodule(part.parameter.removesuffix(tail))
                break
